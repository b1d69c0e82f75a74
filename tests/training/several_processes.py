"""Program of `test_distributed.py`: several short runs on the processes that torchrun has started.

Every process writes what it saw to `OUTPUT/rank<N>.json`. All runs share one start, because loading the libraries takes
longer than training.
"""

import contextlib
import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import mnemon.training.run
from mnemon.cli.app import leave, main
from mnemon.errors import MnemonError
from mnemon.training import train
from mnemon.training.babilong_batches import BabilongBatches
from mnemon.training.batches import share_rows
from mnemon.training.build import build_model, build_tokenizer
from mnemon.training.distributed import Processes, decoder_layer_classes, joined_processes
from mnemon.training.recipe_io import check_recipe
from mnemon.training.trainer import AnswerTrainer


def run(raw: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    """Train, and return the summary or the error."""
    try:
        return train(check_recipe(raw), folder, show_progress=False, **options)
    except MnemonError as error:
        return {"error": type(error).__name__, "message": str(error)}


@contextlib.contextmanager
def at_step(step: int, rank: int, action: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Have `action` applied to the loss of one step (counted from 1) on one process."""
    original = AnswerTrainer.compute_loss

    def patched(self: AnswerTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        return action(loss) if self.state.global_step + 1 == step and dist.get_rank() == rank else loss

    AnswerTrainer.compute_loss = patched  # type: ignore[method-assign]
    yield
    AnswerTrainer.compute_loss = original  # type: ignore[method-assign]


def press_ctrl_c(loss: torch.Tensor) -> torch.Tensor:
    """Interrupt this process; a second time does nothing, as when a launcher repeats the signal."""
    signal.raise_signal(signal.SIGINT)
    return loss


def spoil(loss: torch.Tensor) -> torch.Tensor:
    """Make the loss not a number."""
    return loss * float("nan")


def command(*words: str) -> dict[str, Any]:
    """Run `mnemon train` in this process; return its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["train", *words])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def sharded_gradient_error(raw: dict[str, Any]) -> float:
    """Return the largest error of gradients with weights in pieces against those of the whole batch in one process."""
    recipe = check_recipe(raw)
    tokenizer = build_tokenizer(recipe)
    assert recipe.model.lm2 is not None
    batch = BabilongBatches(recipe.data, tokenizer, 0, 700).make(3, 2)
    share = share_rows(batch, dist.get_rank(), dist.get_world_size(), recipe.model.lm2.segment_length)

    def gradients(rows: dict[str, Any], pieces: bool) -> dict[str, torch.Tensor]:
        model = build_model(recipe, len(tokenizer), tokenizer).double().train()
        if pieces:
            names = decoder_layer_classes(model)
            for module in model.modules():
                if type(module).__name__ in names:
                    fully_shard(module)
            fully_shard(model)
        labels = rows["labels"][:, 1:]
        logits = model(rows["input_ids"], rows["attention_mask"], use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        (losses / batch["answer_tokens"]).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: grad.full_tensor() if pieces else grad for name, grad in found.items()}

    whole, parts = gradients(batch, pieces=False), gradients(share, pieces=True)
    assert whole.keys() == parts.keys()
    assert any(name.startswith("memory.") for name in whole)
    # FSDP averages over the processes, which the Trainer's loss makes up for.
    return max(float((parts[name] * dist.get_world_size() - whole[name]).abs().max()) for name in whole)


def main_program(folder: Path) -> None:
    """Run everything."""
    recipes = json.loads((folder / "recipes.json").read_text())
    seen: dict[str, Any] = {}
    for name in ("plain", "lm2"):
        seen[name] = run(recipes[name], folder / name)
    with at_step(6, 1, press_ctrl_c):
        seen["cut"] = run(recipes["lm2"], folder / "cut")
    seen["resumed"] = run(recipes["lm2"], folder / "cut", resume=True)
    with at_step(6, 1, spoil):
        seen["spoiled"] = run(recipes["plain"], folder / "spoiled")
    seen["occupied"] = run(recipes["plain"], folder / "plain")

    recipes["plain"]["optimisation"]["sharding"] = "fsdp"
    seen["fsdp"] = run(recipes["plain"], folder / "fsdp")
    check = mnemon.training.run.check_sharding
    mnemon.training.run.check_sharding = lambda *_: None  # what accelerate does if it is asked all the same
    seen["fsdp forced"] = run(recipes["plain"], folder / "fsdp")
    mnemon.training.run.check_sharding = check

    recipe = str(folder / "recipe.yaml")
    seen["command"] = command(recipe, "--output", str(folder / "command"), "--json")
    seen["mistake"] = command(recipe, "--set", "optimisation.learning_rat=1")
    seen["sharded gradients"] = sharded_gradient_error(recipes["lm2"])
    if dist.get_rank() == 0:  # the other one leaves, as if it had crashed
        try:
            Processes(0, 2).sum([1.0])
        except MnemonError as error:
            seen["left alone"] = {"error": type(error).__name__, "message": str(error)}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    with joined_processes():
        main_program(Path(sys.argv[1]))
    leave(0)
