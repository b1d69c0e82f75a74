"""Train the same small model with two update rules on associative recall, and compare them on the same questions.

Linear attention adds every value to its memory; Gated DeltaNet first takes away what stands under the key.
Run: python examples/compare_two_rules.py   (about half a minute, no network)
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import mnemon
from mnemon.data.mqar import MqarSettings
from mnemon.evaluation.paired import PairedScores
from mnemon.evaluation.tables import p_text
from mnemon.metrics.mqar import held_out_samples, queries_right
from mnemon.training.recipe_io import load_recipe
from mnemon.training.run import train

RULES = ("linear_attention", "gated_delta_net")
TRAINED = "[{length: 32, num_pairs: 4}, {length: 32, num_pairs: 8}]"
ASKED = ((32, 4), (32, 8), (64, 16))
VOCABULARY, SAMPLES = 80, 300


def trained_model(rule: str, folder: Path) -> torch.nn.Module:
    """Train a Llama of two blocks whose attention is one memory of a rule; data and budget are the same for all."""
    recipe = load_recipe(
        "mqar-study",
        [
            f"model.mom.rule={rule}",
            "model.mom.num_memories=1", "model.mom.top_k=1", "model.mom.shared_memory=false",
            f"data.vocab_size={VOCABULARY}",
            f"data.slices={TRAINED}", f"evaluation.slices={TRAINED}",
            "evaluation.samples=20",
            "model.mom.num_heads=2", "model.mom.head_dim=32",
            "optimisation.max_tokens=380000",
        ],
    )  # fmt: skip
    summary = train(recipe, folder, show_progress=False)
    print(f"{rule}: {summary['parameters']['total']:,} parameters, {summary['tokens']:,} tokens")
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def main() -> None:
    """Train, ask, print the table."""
    mnemon.register()
    disable_progress_bar()  # of the library, for every weight it loads
    scores = {}
    with TemporaryDirectory() as folder:
        for rule in RULES:
            model = trained_model(rule, Path(folder) / rule)
            scores[rule] = {}
            for length, pairs in ASKED:
                settings = MqarSettings(vocab_size=VOCABULARY, length=length, num_pairs=pairs, random_non_queries=False)
                right = queries_right(model, held_out_samples(settings, SAMPLES))
                scores[rule][length, pairs] = right.mean(axis=1)[None]  # share of its questions, for every sample
    compared = PairedScores(scores, families=[ASKED])
    print(f"\n{'tokens':>6} {'pairs':>6}  " + "  ".join(f"{rule:>22}" for rule in RULES) + "   corrected p")
    for column in ASKED:
        cells = []
        for rule in RULES:
            found = compared.estimate(rule, column)
            cells.append(f"{100 * found.mean:6.1f} % [{100 * found.low:5.1f}, {100 * found.high:5.1f}]")
        p = p_text(compared.test(*RULES, column).corrected_p)
        print(f"{column[0]:6} {column[1]:6}  " + "  ".join(cells) + f"   {p}")
    print(f"\n{SAMPLES} samples per line, 95 % intervals, one training seed: more seeds belong to a study.")


if __name__ == "__main__":
    main()
