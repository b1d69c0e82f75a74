"""`mnemon chat`: talk with a model that remembers the conversation, and what it has read before."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli.display import silence_libraries
from mnemon.cli.generate import generation_settings
from mnemon.cli.memory import MemoryOption, as_memory_model, read_memory
from mnemon.cli.options import DeviceOption, ModelArgument, pick_device
from mnemon.errors import ConfigError, MnemonError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mnemon.models.memory_model import MemoryModel
    from mnemon.models.state import MemoryState

_HELP = """/save FILE   write the memory to a file
/forget      go back to an empty memory
/help        show this
/quit        leave (as Ctrl-D does)
Everything else is read into the memory and answered."""


def chat(
    model: ModelArgument,
    memory: MemoryOption = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="What a line is put into: {} stands for it, \\n for a line end. The tokenizer's chat template if it "
            "has one, else the line alone."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float | None, typer.Option(help="With --sample: above 0 (default 1).")] = None,
    top_p: Annotated[float | None, typer.Option(help="With --sample: at most 1 (default 1).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="With --sample: seed of the draws (default 0).")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Talk with a model; every line and every answer goes into its memory. /help lists what can be said."""
    settings = generation_settings(max_new_tokens, sample, temperature, top_p, seed, 1)
    if template is not None and template.count("{}") != 1:
        raise ConfigError(f"--template must hold {{}} once, for the line; got {template!r}")

    import torch

    from mnemon.models.loading import load_model, resolve

    silence_libraries(keep_bars=not Path(resolve(model)).is_dir())
    loaded, tokenizer = load_model(model, device=pick_device(device))
    talker = as_memory_model(loaded, model)
    state = None if memory is None else read_memory(memory, talker, tokenizer)
    conversation = Conversation(talker, tokenizer, settings, state, template)
    # Hugging Face draws from torch's global generator: seed a private copy of it and leave the caller's alone.
    with torch.random.fork_rng(), contextlib.suppress(KeyboardInterrupt):
        torch.manual_seed(0 if seed is None else seed)
        for line in _lines():
            if not _obey(line, conversation):
                break
    if sys.stdin.isatty():
        print()


class Conversation:
    """A model, what it remembers, and how lines are put to it.

    Args:
        model: a model with a memory.
        tokenizer: its tokenizer.
        settings: arguments of `model.generate`.
        state: what it remembers at first; None = nothing.
        template: what a line is put into; None = the tokenizer's chat template, or the line alone.
    """

    def __init__(
        self,
        model: "MemoryModel",
        tokenizer: "PreTrainedTokenizerBase",
        settings: dict[str, Any],
        state: "MemoryState | None" = None,
        template: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.state = state
        self.has_chat_template = template is None and bool(getattr(tokenizer, "chat_template", None))
        self.template = "{}\n" if template is None else template.replace("\\n", "\n")
        self.last_turns: list[dict[str, str]] = []

    def forget(self) -> None:
        """Go back to an empty memory."""
        self.state, self.last_turns = None, []

    def answer(self, line: str) -> str:
        """Print the answer to a line as it comes; remember both."""
        import torch
        from transformers import TextStreamer

        turn = {"role": "user", "content": line}
        asked = self._asked(turn)
        prompt = self._encode(asked)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = torch.tensor([prompt], device=self.model.device)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            memory=self.state,
            streamer=streamer,
            pad_token_id=self.tokenizer.pad_token_id,
            **self.settings,
        )
        new = output[0, len(prompt) :].tolist()
        text = str(self.tokenizer.decode(new, skip_special_tokens=True))
        ending = self._ending(turn, text, new)
        self.state = self.model.memorize(torch.tensor([prompt + ending]), state=self.state)
        self.last_turns = [turn, {"role": "assistant", "content": text}]
        return text

    def _asked(self, turn: dict[str, str]) -> str:
        """Return what a line adds to the text of the conversation, up to where the answer begins."""
        if not self.has_chat_template:
            return self.template.replace("{}", turn["content"])
        before = self._rendered(self.last_turns) if self.last_turns else ""
        whole = self._rendered([*self.last_turns, turn], is_open=True)
        if not whole.startswith(before):  # some templates rewrite earlier turns
            before, whole = "", self._rendered([turn], is_open=True)
        added = whole.removeprefix(before)
        return added.removeprefix(self.tokenizer.bos_token or "") if self.state is not None else added

    def _ending(self, turn: dict[str, str], text: str, new: list[int]) -> list[int]:
        """Return the ids of an answer as it is remembered: closed as the template closes it, or by a line end."""
        if self.has_chat_template:
            closed = self._rendered([turn, {"role": "assistant", "content": text}])
            opened = self._rendered([turn], is_open=True)
            if closed.startswith(opened):
                return self._encode(closed.removeprefix(opened), begins=False)
            return new
        is_closed = text.endswith("\n") or (bool(new) and new[-1] == self.tokenizer.eos_token_id)
        return new if is_closed else [*new, *self._encode("\n", begins=False)]

    def _rendered(self, turns: list[dict[str, str]], is_open: bool = False) -> str:
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=is_open))

    def _encode(self, text: str, begins: bool = True) -> list[int]:
        """Return the ids of a text; the very first of a conversation begins as the tokenizer begins a text."""
        from mnemon.data.token_stream import beginning_ids

        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        is_first = begins and self.state is None and not self.has_chat_template
        return [*beginning_ids(self.tokenizer), *ids] if is_first else ids


def _lines() -> Iterator[str]:
    """Yield what is typed or piped in, line by line."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def _obey(line: str, conversation: Conversation) -> bool:
    """Do what a line asks for; returns whether the conversation goes on."""
    word, _, rest = line.strip().partition(" ")
    if not word:
        return True
    if word == "/quit":
        return False
    if word == "/help":
        print(_HELP)
    elif word == "/forget":
        conversation.forget()
        print("(the memory is empty)")
    elif word == "/save":
        _save(rest.strip(), conversation)
    elif word.startswith("/"):
        print(f"(no command {word}; /help lists them)")
    else:
        conversation.answer(line)
    return True


def _save(name: str, conversation: Conversation) -> None:
    if not name:
        print("(name a file: /save FILE)")
    elif conversation.state is None:
        print("(there is nothing to save yet)")
    else:
        try:
            conversation.state.save(name, conversation.tokenizer)
            print(f"(wrote {name}: {conversation.state.tokens_read[0]:,} tokens remembered)")
        except MnemonError as error:  # the conversation is worth more than a file name
            print(f"({error})")
