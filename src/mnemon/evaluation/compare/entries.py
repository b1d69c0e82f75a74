"""Names of the models of several runs, and which of them are training seeds of one recipe."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mnemon.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """One trained model in one run.

    Attributes:
        label: its name in that run.
        source: the run, as the user wrote it.
        prefix: label given for the run, "" if none.
        is_alone: whether the run holds no other model.
        recipe: name of its recipe, "" if unknown.
        seed: training seed, None if unknown.
        variant: how it differs from the model of its recipe, for example " (knocked out)".
        kind: everything else that members of one group share.
    """

    label: str
    source: str
    prefix: str = ""
    is_alone: bool = False
    recipe: str = ""
    seed: int | None = None
    variant: str = ""
    kind: Hashable = None

    @property
    def given_label(self) -> str:
        """Label with the run's own: alone in its run a model is called as the run, others get it in front."""
        if not self.prefix:
            return self.label
        return self.prefix if self.is_alone else f"{self.prefix}: {self.label}"


def final_labels(entries: Sequence[Entry], *, separate_seeds: bool = False) -> list[str]:
    """Name every entry; those of one recipe and different training seeds get the same name.

    Args:
        entries: the models of all runs.
        separate_seeds: keep every seed a model of its own.

    Returns:
        One label per entry, in their order.

    Raises:
        ConfigError: if two models that are no seeds of one recipe have the same label; it says how to name them.
    """
    labels = [entry.given_label for entry in entries]
    groups: dict[Hashable, list[int]] = {}
    for index, entry in enumerate(entries):
        if entry.recipe and entry.seed is not None:
            groups.setdefault((entry.prefix, _recipe(entry), entry.variant, entry.kind), []).append(index)
    members: dict[int, int] = {}
    for indices in groups.values():
        seeds = [entries[index].seed for index in indices]
        if len(indices) < 2 or len(set(seeds)) < len(seeds):
            continue
        names = {labels[index] for index in indices}
        common = names.pop() if len(names) == 1 else _group_name(entries[indices[0]])
        for index in indices:
            labels[index] = f"{common} (seed {entries[index].seed})" if separate_seeds else common
            members[index] = index if separate_seeds else indices[0]
    _refuse_same_labels(entries, labels, [members.get(index, index) for index in range(len(entries))])
    return labels


def _recipe(entry: Entry) -> str:
    """Return the name that all seeds of a recipe have; a study's runs are called "lm2-seed0", "lm2-seed1"."""
    return entry.recipe.removesuffix(f"-seed{entry.seed}")


def _group_name(entry: Entry) -> str:
    return f"{entry.prefix or _recipe(entry)}{entry.variant}"


def _refuse_same_labels(entries: Sequence[Entry], labels: Sequence[str], groups: Sequence[int]) -> None:
    """Refuse a label that stands for more than one group."""
    counts = Counter(label for label, _ in {(label, group) for label, group in zip(labels, groups, strict=True)})
    for label, count in counts.items():
        if count > 1:
            sources = [entry.source for entry, name in zip(entries, labels, strict=True) if name == label]
            sources = list(dict.fromkeys(sources)) if len(set(sources)) > 1 else sources[:2]  # seeds share theirs
            example = " ".join(f"{chr(65 + number)}={source}" for number, source in enumerate(sources[:2]))
            raise ConfigError(f"the label {label!r} stands in {' and '.join(sources)}; name the runs: {example}")
