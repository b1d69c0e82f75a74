"""What a benchmark of update rules measures: one value that goes through all of it and stands beside its results."""

from dataclasses import dataclass

PARTS = ("forward", "backward", "step")
MIB = 2**20


@dataclass(frozen=True)
class OpsSettings:
    """What to measure.

    Attributes:
        parts: which of `PARTS`; "backward" is forward and backward together.
        rules: names of update rules.
        lengths: tokens T, rising.
        repeats: rounds that count.
        time_limit: longest expected single run in seconds; what would take longer is left out.
        device: torch device.
        dtype: dtype of queries, keys and values.
        threads: CPU threads.
        batch_size: sequences B of forward and backward.
        num_heads: heads H.
        head_dim: key width K and value width V.
        num_slots: slots J, for rules with slots.
        step_bytes: least size of the state that one step changes; the batch is chosen to reach it.
        all_variants: run the contract's checks with every setting of a rule, not only with its defaults.
    """

    parts: tuple[str, ...]
    rules: tuple[str, ...]
    lengths: tuple[int, ...]
    repeats: int = 7
    time_limit: float = 10.0
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    batch_size: int = 1
    num_heads: int = 4
    head_dim: int = 64
    num_slots: int = 64
    step_bytes: int = 64 * MIB
    all_variants: bool = True
