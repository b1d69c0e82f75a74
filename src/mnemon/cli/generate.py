"""`mnemon generate`: continue a text with any causal language model, ours or Hugging Face's."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli.display import silence_libraries
from mnemon.cli.memory import MemoryOption, as_memory_model, read_memory
from mnemon.cli.options import JsonOption, KnockOutOption, ModelArgument
from mnemon.errors import ConfigError, DataError
from mnemon.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mnemon.models.state import MemoryState


def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; standard input when not given.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File that holds the text to continue (UTF-8).")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="With --sample: above 0; lower is more careful (default 1).")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="With --sample: keep the likeliest tokens of this joint probability (default 1)."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="With --sample: seed of the draws (default 0).")] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams of a beam search; 1 is greedy.")] = 1,
    json_output: JsonOption = False,
    knock_out_memory: KnockOutOption = False,
    memory: MemoryOption = None,
) -> None:
    """Continue a text: `mnemon generate MODEL --prompt "..."`, or the text on standard input."""
    settings = generation_settings(max_new_tokens, sample, temperature, top_p, seed, beams)
    text = _read_prompt(prompt, prompt_file)

    from mnemon.models.loading import load_model, resolve

    silence_libraries(keep_bars=not Path(resolve(model)).is_dir())  # only a download is worth a bar
    loaded, tokenizer = load_model(model)
    if knock_out_memory:
        from mnemon.evaluation.controls import has_memory

        if not has_memory(loaded):
            raise ConfigError(f"{model}: has no memory to knock out; leave out --knock-out-memory")
        settings["knock_out_memory"] = True
    state = None if memory is None else read_memory(memory, as_memory_model(loaded, model), tokenizer)
    result = _continue(loaded, tokenizer, text, settings, 0 if seed is None else seed, not json_output, state)
    if json_output:
        remembered = {} if state is None else {"memory": str(memory), "tokens_remembered": state.tokens_read[0]}
        report = {"model": model, "prompt": text, **remembered, **result, "settings": settings}
        print(json.dumps(report, ensure_ascii=False))


def generation_settings(
    max_new_tokens: int, sample: bool, temperature: float | None, top_p: float | None, seed: int | None, beams: int
) -> dict[str, Any]:
    """Check the options against each other and return them as arguments of `model.generate`."""
    if not sample:
        given = {"--temperature": temperature, "--top-p": top_p, "--seed": seed}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"{name} only matters when tokens are drawn; add --sample or leave it out")
    elif beams > 1:
        raise ConfigError("--sample and --beams exclude each other; give one of them")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ConfigError(f"--temperature must be a number above 0, got {temperature}; leave out --sample for greedy")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p must be above 0 and at most 1, got {top_p}")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample, "num_beams": beams}
    if sample:
        # top_k=0: draw from the whole distribution, not from the library's silent default of 50 tokens.
        settings |= {"temperature": temperature or 1.0, "top_p": top_p or 1.0, "top_k": 0}
    return settings


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """Take the prompt from the one place the user named, or from standard input."""
    if prompt is not None and prompt_file is not None:
        raise ConfigError("--prompt and --prompt-file exclude each other; give one of them")
    if prompt_file is not None:
        return read_text(prompt_file).rstrip("\n")
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise ConfigError("there is no prompt; give --prompt, --prompt-file or text on standard input")
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: byte {error.start} is not UTF-8; convert the text to UTF-8") from error
    if not prompt.strip():
        raise ConfigError("the prompt is empty; give at least one word")
    return prompt


def _continue(
    model: Any,  # a PreTrainedModel that generates, a combination the library's types do not express
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    settings: dict[str, Any],
    seed: int,
    stream: bool,
    memory: "MemoryState | None" = None,
) -> dict[str, Any]:
    """Generate, printing tokens as they come when `stream` is set, and return the new text and its length.

    After a memory the prompt is no beginning of a text, so it gets no token that marks one.
    """
    import torch
    from transformers import TextStreamer

    encoded = tokenizer(prompt, add_special_tokens=memory is None, return_tensors="pt").to(model.device)
    inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    if memory is not None:
        inputs["memory"] = memory
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    as_it_comes = stream and settings["num_beams"] == 1
    # Hugging Face draws from torch's global generator: seed a private copy of it and leave the caller's alone.
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            **inputs, **settings, pad_token_id=tokenizer.pad_token_id, streamer=streamer if as_it_comes else None
        )
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new_tokens, skip_special_tokens=True)
    if stream and not as_it_comes:
        print(text)
    return {"text": text, "new_tokens": len(new_tokens)}
