"""Small workloads and evaluators that the tests of planning share."""

from __future__ import annotations

from typing import Any

from strategies import make_trace

from moeplace.affinity import count_routing
from moeplace.hardware import load_accelerator
from moeplace.model import Attention, ModelSpec
from moeplace.planning.evaluate import Demands, Evaluator
from moeplace.planning.pricebook import load_price_book
from moeplace.planning.workload import Workload, make_workload

MODEL = ModelSpec(
    name="toy",
    num_layers=3,
    moe_layer_ids=(1, 2),
    num_experts=16,
    top_k=2,
    hidden=1024,
    expert_inner=2048,
    num_shared=1,
    shared_inner=512,
    vocab=1000,
    dense_inner=4096,
    attention=Attention(num_heads=16, num_kv_heads=4, head_dim=64),
)


def toy_workload(**options: Any) -> Workload:
    """Twelve requests of a model with 16 experts; prompts and decode tokens."""
    trace = make_trace(3, tokens=240, layers=2, experts=16, top_k=2, requests=12)
    return make_workload(trace, options.pop("model", MODEL), **{"steps": 8, "context": 500, "prompt": 32, **options})


def toy_evaluator(*names: str, demands: Demands | None = None, **options: Any) -> Evaluator:
    """An evaluator of the toy workload on some accelerators."""
    trace = make_trace(3, tokens=240, layers=2, experts=16, top_k=2, requests=12)
    return Evaluator(
        workload=toy_workload(**options),
        stats=count_routing(trace),
        accelerators={name: load_accelerator(name) for name in names or ("h100",)},
        book=load_price_book(),
        demands=demands or Demands(),
        solver="eplb",
    )
