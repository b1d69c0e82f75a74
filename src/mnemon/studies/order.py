"""What is ordered of a study on the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mnemon.errors import ConfigError
from mnemon.evaluation.samples import check_lengths
from mnemon.studies.registry import get_scale, get_study
from mnemon.studies.study import Scale, Study


@dataclass(frozen=True)
class Order:
    """What of a study is wanted.

    Attributes:
        study: name.
        scale: name of the size.
        seeds: number of seeds; None = the scale's.
        only: patterns of variants; none = all.
        changes: `section.key=value` for all runs.
        samples: samples per measured cell; None = the scale's.
        lengths: names of the measured lengths such as "4k"; none = the scale's.
    """

    study: str
    scale: str
    seeds: int | None = None
    only: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    samples: int | None = None
    lengths: tuple[str, ...] = ()

    def resolve(self) -> tuple[Study, Scale]:
        """Return study and size, with the number of seeds and what is measured as ordered.

        Raises:
            ConfigError: a name is unknown, or the study has no such choice.
        """
        study = get_study(self.study)
        scale = get_scale(study, self.scale)
        if self.samples is not None and not scale.samples:
            raise ConfigError(f"--samples says nothing about {study.name}; set evaluation.samples")
        if self.lengths and not scale.lengths:
            raise ConfigError(f"--lengths says nothing about {study.name}, whose recipe says what is measured")
        lengths = check_lengths(self.lengths) if self.lengths else scale.lengths
        samples = scale.samples if self.samples is None else self.samples
        return study, replace(scale, seeds=self.seeds or scale.seeds, samples=samples, lengths=lengths)
