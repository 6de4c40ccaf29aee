"""A traced model in ONNX's operators, simplified."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import onnx_ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants, inline
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules

OPSET = 20
FOLDED = 1 << 20
"""Entries of a constant that is computed from others in advance: more than a kernel head's coefficients have."""
RULES = (
    rules.add_0_rule, *rules.add_0_rule.commute(), rules.mul_by_1_rule, *rules.mul_by_1_rule.commute(),
    rules.cast_cast_rule, rules.no_op_cast_rule, rules.no_op_expand_rule, rules.no_op_transpose_rule,
    rules.transpose_transpose_rule, rules.collapse_slice_rule, rules.collapse_slice2_rule,
    rules.unsqueeze_unsqueeze_rule, rules.squeeze_reshape_1d_rule, rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    *([rules.materialize_reshape_shape_rule] if hasattr(rules, "materialize_reshape_shape_rule") else []),  # from 0.7.2
)  # fmt: skip
"""Of onnxscript's rules for any graph, those that apply to models like ours. One of the others, which looks for slices
that are a split, takes more time than the rest of the translation."""


def translate(traced: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """Translate a traced model to ONNX, with inputs and outputs under these names, and print nothing on the way."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells everyone that torchvision is absent
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            with _traced_once(traced):
                model = _translated(traced, inputs, outputs)
        except torch.onnx.OnnxExporterError:  # an operator that has no translation of its own
            model = _translated(traced, inputs, outputs)
        simplify(model)
    return onnx_ir.to_proto(model)


def _translated(traced: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> onnx_ir.Model:
    program = torch.onnx.export(
        traced,
        dynamo=True,
        opset_version=OPSET,
        input_names=inputs,
        output_names=outputs,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    return program.model


@contextlib.contextmanager
def _traced_once(traced: torch.export.ExportedProgram) -> Iterator[None]:
    """As long as this lasts, a program that has nothing to be taken apart is given back where it is to be taken apart.

    ``torch.onnx.export`` has every program taken apart into simpler operators, which traces it once more and takes as
    long as the first time. But most operators have a translation as they are.
    """
    take_apart = traced.run_decompositions

    def where_needed(table: Any = None) -> torch.export.ExportedProgram:
        graphs = (part.graph for part in traced.graph_module.modules() if isinstance(part, torch.fx.GraphModule))
        targets = {node.target for graph in graphs for node in graph.nodes}
        needed = table is None or any(target in table or _writes(target) for target in targets)
        return take_apart(table) if needed else traced

    traced.run_decompositions = where_needed
    try:
        yield
    finally:
        del traced.run_decompositions


def _writes(target: Any) -> bool:
    """True of an operator that changes what it is given, such as ``add_``."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def simplify(model: onnx_ir.Model) -> None:
    """Compute what is constant, leave out what changes nothing, and keep one of what is twice the same."""
    inline(model)
    fold_constants(model, onnx_shape_inference=True)
    rewrite(model, RULES)
    fold_constants(model, onnx_shape_inference=True, input_size_limit=FOLDED, output_size_limit=FOLDED)
    onnx_ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
