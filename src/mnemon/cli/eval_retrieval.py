"""The options of `mnemon eval` that add the retrieval baseline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnemon.errors import ConfigError

if TYPE_CHECKING:
    from mnemon.evaluation.retrieval import Retriever

RetrieverOption = Annotated[
    str | None,
    typer.Option(
        "--retriever", help="Let models read only what this finds in a text: bm25 or dense.", show_default=False
    ),
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", min=1, help="Units to read, best first. (default: 5)", show_default=False)
]
UnitOption = Annotated[
    str | None,
    typer.Option("--retrieval-unit", help="What is found: sentence or chunk. (default: sentence)", show_default=False),
]
ChunkTokensOption = Annotated[
    int | None, typer.Option("--chunk-tokens", min=1, help="Tokens of a chunk. (default: 64)", show_default=False)
]
RetrieverModelOption = Annotated[
    Path | None,
    typer.Option("--retriever-model", help="For dense: folder of a sentence-transformers model.", show_default=False),
]


def build_retriever(
    kind: str | None,
    top_k: int | None,
    unit: str | None,
    chunk_tokens: int | None,
    model: Path | None,
    device: str,
) -> "Retriever | None":
    """Build the retriever that the options ask for; None if they ask for none.

    Raises:
        ConfigError: if an option is wrong, or says nothing about the retriever asked for.
        BackendUnavailable: if a package is missing.
    """
    details = {"--top-k": top_k, "--retrieval-unit": unit, "--chunk-tokens": chunk_tokens, "--retriever-model": model}
    if kind is None:
        for name, value in details.items():
            if value is not None:
                raise ConfigError(f"{name} says nothing without a retriever; add --retriever bm25 or dense")
        return None
    from mnemon.evaluation.retrieval import CHUNK_TOKENS, KINDS, UNITS, RetrievalSettings, make_retriever

    known_kind = next((known for known in KINDS if known == kind), None)
    if known_kind is None:
        raise ConfigError(f"unknown retriever {kind!r}; expected one of {', '.join(KINDS)}")
    known_unit = next((known for known in UNITS if known == (unit or "sentence")), None)
    if known_unit is None:
        raise ConfigError(f"unknown retrieval unit {unit!r}; expected one of {', '.join(UNITS)}")
    if known_unit == "sentence" and chunk_tokens is not None:
        raise ConfigError("--chunk-tokens is for chunks; add --retrieval-unit chunk")
    if known_kind == "dense" and model is None:
        raise ConfigError("--retriever dense needs an embedding model; add --retriever-model FOLDER")
    if known_kind == "bm25" and model is not None:
        raise ConfigError("--retriever-model is for --retriever dense, not for bm25; leave it out")
    settings = RetrievalSettings(
        kind=known_kind,
        top_k=top_k or 5,
        unit=known_unit,
        chunk_tokens=chunk_tokens or CHUNK_TOKENS,
        model="" if model is None else str(model),
    )
    return make_retriever(settings, device)
