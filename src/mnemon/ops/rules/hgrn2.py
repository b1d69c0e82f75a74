"""HGRN2: a memory that decays per key channel, where what is kept and what is written are tied.

    S_t = Diag(exp(g_t)) S_{t-1} + k_t^T v_t with k_t = 1 - exp(g_t);   o_t = q_t S_t

The recurrence is that of gated linear attention; HGRN2 is the choice of the keys, which makes every row of the memory a
weighted mean of values. The caller forms the keys (the layer does), so that the recurrence stays one of k, v and g.

Source: HGRN2: Gated Linear RNNs with State Expansion, arXiv:2404.07904, section 3; the paper's forget gate is exp(g).
"""

from dataclasses import replace

from mnemon.ops.declaration import GateSpec, Source
from mnemon.ops.rules import gla

RULE = replace(
    gla.RULE,
    name="hgrn2",
    equation="S ← Diag(exp(g))S + (1 − exp(g))ᵀv;  o = q S",
    source=Source("HGRN2: Gated Linear RNNs with State Expansion", "2404.07904", "section 3"),
    gates=(GateSpec("g", "key", "log_decay", identity=0.0, meaning="log of the forget gate; the key is 1 − exp(g)"),),
)
