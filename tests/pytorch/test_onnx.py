"""torch.onnx.export of a model with the ops says in one sentence that there is no such thing."""

import importlib.util
import warnings

import pytest
import torch

import adasplash
import common

SENTENCE = "cannot be exported to ONNX, which has no operator for it; torch.export, AOTInductor and TorchScript take it"
OFFSETS = torch.tensor([0, 2, 6])


class Attention(torch.nn.Module):
    name = "entmax_attn"

    def forward(self, x):
        return adasplash.entmax_attn(x[None], x[None], x[None], is_causal=True)


class AlphaPerHead(Attention):
    def forward(self, x):
        return adasplash.entmax_attn(x[None], x[None], x[None], torch.full(x.shape[:1], 1.4))


class Packed(torch.nn.Module):
    name = "entmax_attn_varlen"

    def forward(self, x):
        return adasplash.entmax_attn_varlen(x, x, x, OFFSETS, OFFSETS, 4, 4)


class Activation(torch.nn.Module):
    name = "entmax"

    def forward(self, x):
        return adasplash.entmax(x, 1.4)


MODELS = (Attention, AlphaPerHead, Packed, Activation)


@pytest.mark.parametrize("model", MODELS)
def test_exporter_of_torchscript(model, tmp_path):
    onnx = pytest.importorskip("torch.onnx")
    with warnings.catch_warnings(), pytest.raises(onnx.OnnxExporterError) as error:
        warnings.simplefilter("ignore")
        onnx.export(model().eval(), (torch.randn(6, 2, 8),), tmp_path / "model.onnx", dynamo=False)
    assert str(error.value) == f"adasplash.{model.name} {SENTENCE}"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="onnxscript is not installed")
@pytest.mark.parametrize("model", MODELS)
def test_exporter_of_torch_export(model, tmp_path):
    onnx = pytest.importorskip("torch.onnx")
    with pytest.raises(onnx.OnnxExporterError) as error:
        onnx.export(model().eval(), (torch.randn(6, 2, 8),), tmp_path / "model.onnx", dynamo=True, verbose=False)
    # What the exporter makes of it is long, but has the sentence. By then the padded and the packed form are one op.
    assert f"adasplash.{model.name.removesuffix('_varlen')} {SENTENCE}" in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="onnxscript is not installed")
def test_a_translation_of_the_users_comes_first(tmp_path):
    onnx = pytest.importorskip("torch.onnx")
    import onnxscript

    opset = onnxscript.opset18

    def stand_in(input, row_alpha=None, alpha: float = 1.5):
        return opset.Identity(input)

    onnx.export(
        Activation().eval(),
        (torch.randn(6, 2, 8),),
        tmp_path / "model.onnx",
        dynamo=True,
        verbose=False,
        custom_translation_table={torch.ops.adasplash._entmax_forward.default: stand_in},
    )
    assert (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("first", ("adasplash", "torch.onnx"))
def test_whichever_is_imported_first(first):
    second = {"adasplash": "torch.onnx"}.get(first, "adasplash")
    common.run_python(
        f"""
import sys
import {first}
assert {first!r} != "adasplash" or "torch.onnx" not in sys.modules
import {second}
from torch.onnx._internal.torchscript_exporter.registration import registry
assert registry.is_registered_op("adasplash::entmax_attn", 17)
"""
    )
