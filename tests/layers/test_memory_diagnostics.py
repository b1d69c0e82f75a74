"""What is said of a bank is what is in it."""

import torch
from lm2_cases import SEGMENT, lfm2_config, llama_config, lm2, tokens

from mnemon.layers.memory_bank import initial_bank
from mnemon.layers.memory_diagnostics import MemoryDiagnostics, slot_similarity, written_share


def test_an_untouched_slot_is_unwritten_and_a_replaced_one_fully_written():
    initial = initial_bank(3, 4).double()
    bank, kept = initial.clone(), torch.ones(3, 4, dtype=torch.float64)
    kept[1] = 0.0
    bank[1] = torch.tensor([0.3, -0.2, 0.1, 0.9])
    kept[2] = 0.5
    bank[2] = 0.5 * initial[2]
    bank[2, 0] += 0.5  # as much new content as is left of the old
    assert torch.allclose(written_share(bank, kept, initial), torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64))


def test_similarity_tells_equal_slots_from_orthogonal_ones():
    assert float(slot_similarity(torch.eye(5))) == 0
    assert abs(float(slot_similarity(torch.randn(1, 7).expand(5, 7))) - 1) < 1e-6
    half = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert abs(float(slot_similarity(half)) - 1 / 3) < 1e-6
    assert float(slot_similarity(torch.randn(1, 4))) == 0


def test_the_means_follow_from_the_weights_gates_and_shares_given():
    found = MemoryDiagnostics()
    weights = torch.tensor([0.75, 0.25, 0.0]).expand(2, 1, 4, 3)
    valid = torch.tensor([[True] * 4, [True, False, False, False]])
    share = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    term, branch = torch.full((2, 4, 6), 0.5), torch.ones(2, 4, 6)
    found.add_read(3, weights, torch.full((2, 4, 5), 0.2), share, term, branch, valid)
    means = {name: float(value) for name, value in found.means().items()}
    assert abs(means["read_on_written"] - (4 * 0.75 + 1 * 0.25) / 5) < 1e-6
    assert abs(means["output_gate/block3"] - 0.2) < 1e-6
    assert abs(means["term_to_attention"] - 0.5) < 1e-6
    assert abs(means["read_slots"] - 1.7547654) < 1e-5  # exp of the entropy of (3/4, 1/4)
    assert found.read_shares() == {3: [0.75, 0.25, 0.0]}


def test_a_forward_pass_returns_diagnostics_when_asked_and_the_same_logits():
    model, ids = lm2(lfm2_config(), attention_span=9), tokens(2, 5 * SEGMENT)
    with torch.no_grad():
        silent, spoken = model(ids), model(ids, output_diagnostics=True)
        with model.collect_diagnostics() as collected:
            model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert silent.diagnostics is None
    assert torch.equal(silent.logits, spoken.logits)
    names = {"read_on_written", "read_slots", "output_gate", "term_to_attention", "input_gate", "forget_gate",
             "written_share", "slot_similarity", "bank_rms"}  # fmt: skip
    blocks = {f"{name}/block{index}" for name in names for index in (1, 3)}
    assert spoken.diagnostics.keys() == names | blocks == collected.means().keys()
    assert all(value.ndim == 0 and value.isfinite() for value in spoken.diagnostics.values())
    assert model(ids).diagnostics is None


def test_reads_in_the_first_segment_fall_on_nothing_written():
    model = lm2(llama_config())
    with torch.no_grad():
        first = model(tokens(2, SEGMENT), output_diagnostics=True).diagnostics
        later = model(tokens(2, 4 * SEGMENT), output_diagnostics=True).diagnostics
    assert float(first["read_on_written"]) == 0
    assert float(later["read_on_written"]) > 0.1


def test_retention_shows_in_the_forget_gate():
    torch.manual_seed(0)
    fresh = lm2(llama_config(), flow="layer", retention=0.8)
    with torch.no_grad():
        for bank in fresh.banks:
            for gate in (bank.input_gate, bank.forget_gate, bank.forget_gate_bank):
                gate.weight.zero_()
        found = fresh(tokens(1, 2 * SEGMENT), output_diagnostics=True).diagnostics
    assert abs(float(found["forget_gate"]) - 0.8) < 1e-6
    assert abs(float(found["input_gate"]) - 0.5) < 1e-6
