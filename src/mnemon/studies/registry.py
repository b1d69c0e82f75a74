"""Find studies by name."""

import difflib

from mnemon.errors import ConfigError
from mnemon.studies.lm2_ablation import Lm2Ablation
from mnemon.studies.lm2_figure5 import Lm2Figure5
from mnemon.studies.lm2_mmlu import Lm2Mmlu
from mnemon.studies.lm2_more_tasks import Lm2MoreTasks
from mnemon.studies.lm2_table1 import Lm2Table1
from mnemon.studies.mom_mqar import MomMqar
from mnemon.studies.mom_text import MomText
from mnemon.studies.study import Scale, Study

_STUDIES: dict[str, Study] = {
    study.name: study
    for study in (Lm2Table1(), Lm2MoreTasks(), Lm2Ablation(), Lm2Figure5(), Lm2Mmlu(), MomMqar(), MomText())
}
_TOGETHER = {"mom-tables": ("mom-mqar", "mom-text")}


def list_studies() -> tuple[str, ...]:
    """Return the names of all studies."""
    return tuple(_STUDIES)


def parts_of(name: str, scale: str) -> tuple[str, ...]:
    """Return the studies that a name stands for: itself, or those of several that have a size.

    Raises:
        ConfigError: nothing is called so, or none of several has this size.
    """
    if name not in _TOGETHER:
        if name not in _STUDIES:
            raise ConfigError(f"no study is called {name!r}{_near(name, [*_STUDIES, *_TOGETHER])}")
        return (name,)
    parts = tuple(part for part in _TOGETHER[name] if scale in _STUDIES[part].scales)
    if not parts:
        known = {scale for part in _TOGETHER[name] for scale in _STUDIES[part].scales}
        raise ConfigError(f"{name} has no scale {scale!r}{_near(scale, sorted(known))}")
    return parts


def get_study(name: str) -> Study:
    """Return the study of a name.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    if name not in _STUDIES:
        raise ConfigError(f"no study is called {name!r}{_near(name, list(_STUDIES))}")
    return _STUDIES[name]


def get_scale(study: Study, name: str) -> Scale:
    """Return a size of a study.

    Raises:
        ConfigError: the study has no such size.
    """
    if name not in study.scales:
        raise ConfigError(f"{study.name} has no scale {name!r}{_near(name, list(study.scales))}")
    return study.scales[name]


def _near(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(known)}"
