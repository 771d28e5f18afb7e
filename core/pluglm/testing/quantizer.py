"""The conformance kit for quantizers.

    import pluglm_quantizer_torchao
    from pluglm.testing.quantizer import QuantizerContract

    class TestTorchao(QuantizerContract):
        provider = pluglm_quantizer_torchao

Dtypes and numerics are those of the provider's `pluglm.json`: `rtol` bounds a layer's error relative to its largest
output, `atol` is added to it.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from pluglm.contracts import PublishedQuantizer, Quantizer, QuantizerRequest, TableQuantizer, WeightMap, rules
from pluglm.contracts.packed import BlockedEmbedding, BlockedLinear, GroupedLinear
from pluglm.errors import UnsupportedRequestError
from pluglm.weights import export_weights, load_weights

DTYPES = ("float32", "float64", "bfloat16", "float16")


class QuantizerContract:
    """Subclass it under a name that starts with Test. A test may be weakened only by `xfail(reason=…)`.

    Attributes:
        provider: the module or object with the hook `pluglm_build_quantizer`: what your entry point names.
        name: which quantizer of the package's `pluglm.json`; None: the only one.
        variant: what users write after the colon; None: the default.
        device: where the tensors of the tests lie.
        layer: the name of a layer that is taken. table: of a token table, for a `TableQuantizer`.
        sizes: (out, in) of the layers; pairwise different, and of a kind that is taken (multiples of a group).
        rounds_inputs: its layers round what they are given, too, so that a product is not that with the weight they
            offer; then the declared numerics bound the difference.
    """

    provider: ClassVar[Any]
    name: ClassVar[str | None] = None
    variant: ClassVar[str | None] = None
    device: ClassVar[str] = "cpu"
    layer: ClassVar[str] = "layers.0.attn.q"
    table: ClassVar[str] = "embed"
    sizes: ClassVar[tuple[tuple[int, int], ...]] = ((96, 64), (32, 192), (160, 128))
    rounds_inputs: ClassVar[bool] = False

    # What a subclass may replace.

    def facts(self) -> Mapping[str, Any]:
        """The provider's entry in its package's `pluglm.json`."""
        module = self.provider.__name__ if isinstance(self.provider, ModuleType) else type(self.provider).__module__
        package = module.partition(".")[0]
        text = (importlib.resources.files(importlib.import_module(package)) / "pluglm.json").read_text("utf-8")
        found = [
            facts
            for facts in json.loads(text)["providers"]
            if facts["kind"] == "quantizer" and self.name in (None, facts["name"])
        ]
        assert len(found) == 1, f"{len(found)} quantizers in {package}/pluglm.json; set `name` to one of them."
        facts: dict[str, Any] = found[0]
        return facts

    def build(self, dtype: str | None = None, **request: Any) -> Quantizer:
        """The quantizer for a compute dtype; the provider's hook is called as the core calls it."""
        given = {"variant": self.variant, **request}
        wanted = QuantizerRequest(device=self.device, dtype=dtype or self.dtypes()[0], **given)
        quantizer: Quantizer = self.provider.pluglm_build_quantizer(request=wanted)
        return quantizer

    # What the facts settle.

    def dtypes(self) -> tuple[str, ...]:
        """The listed dtypes that this kit knows; all if none are listed."""
        listed = self.facts().get("requires", {}).get("dtypes", ())
        return tuple(name for name in DTYPES if name in listed or not listed)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each listed dtype, with and without a bias, and for each size."""
        values: dict[str, tuple[Any, ...]] = {
            "dtype": self.dtypes(),
            "unlisted": tuple(name for name in DTYPES if name not in self.dtypes()),
            "bias": (False, True),
            "size": self.sizes,
        }
        for name in sorted(values.keys() & set(metafunc.fixturenames)):
            metafunc.parametrize(name, values[name], ids=str)

    def tensors(self, size: tuple[int, int], dtype: str, bias: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """weight [out, in], bias [out] or None, and an input [2, 3, in]; rows of the weight differ in scale."""
        generator = torch.Generator().manual_seed(size[0] + size[1])
        out_features, in_features = size
        scales = torch.logspace(-2, 0, out_features)[:, None]
        weight = torch.randn(size, generator=generator) * scales
        shift = torch.randn(out_features, generator=generator)
        x = torch.randn(2, 3, in_features, generator=generator)
        moved = [t.to(device=self.device, dtype=getattr(torch, dtype)) for t in (weight, shift, x)]
        return moved[0], moved[1] if bias else None, moved[2]

    # The replacement.

    def test_the_error_of_a_layer_is_within_the_declared_numerics(
        self, size: tuple[int, int], dtype: str, bias: bool
    ) -> None:
        """Against the product of the given weights in float64."""
        weight, shift, x = self.tensors(size, dtype, bias)
        before = weight.clone()
        y = self.build(dtype).quantize(self.layer, weight.clone(), shift)(x)
        assert y.shape == (2, 3, size[0]), f"the output has shape {tuple(y.shape)}"
        assert y.dtype == x.dtype, f"the output is {y.dtype}, the input {x.dtype}"
        want = x.double() @ before.double().T + (shift.double() if shift is not None else 0)
        numerics = self.facts().get("numerics", {})
        limit = numerics.get("atol", 0.0) + numerics.get("rtol", 0.0) * float(want.abs().max())
        error = float((y.double() - want).abs().max())
        assert error <= limit, f"off by {error:.3g}, pluglm.json allows {limit:.3g}"

    def test_a_replacement_has_no_weight_or_bias_of_its_own_and_needs_no_gradient(self, bias: bool) -> None:
        """That is how packed and plain layers are told apart when a model is saved."""
        module = self.quantized(self.dtypes()[0], bias)
        own = {name for name, _ in module.named_parameters(recurse=False)}
        assert not own & {"weight", "bias"}, f"it has parameters of its own called {sorted(own & {'weight', 'bias'})}"
        held = [*module.parameters(), *module.buffers()]
        assert held, "it holds neither parameters nor buffers: nothing would be moved or saved"
        assert not any(t.requires_grad for t in module.parameters())
        assert not any(t.is_meta for t in held)

    def test_bits_are_those_of_the_packed_tensors(self) -> None:
        """Scales included, on a layer that is wide enough for them to be few; within a tenth."""
        size = (64, 1024)
        weight, _, _ = self.tensors(size, self.dtypes()[0], bias=False)
        quantizer = self.build()
        packed = quantizer.pack(quantizer.quantize(self.layer, weight, None))
        bits = 8 * sum(t.nbytes for t in packed.values()) / (size[0] * size[1])
        assert abs(bits - quantizer.bits) <= 0.1 * bits, f"bits says {quantizer.bits}, the tensors take {bits:.2f}"

    # Packing.

    def quantized(self, dtype: str, bias: bool, quantizer: Quantizer | None = None) -> nn.Module:
        """A replacement of the first size."""
        weight, shift, _ = self.tensors(self.sizes[0], dtype, bias)
        return (quantizer or self.build(dtype)).quantize(self.layer, weight, shift)

    def test_what_was_packed_written_and_unpacked_computes_the_same_bits(
        self, size: tuple[int, int], dtype: str, bias: bool, tmp_path: Path
    ) -> None:
        """The reader is another quantizer, which knows the config and the file alone."""
        from safetensors.torch import load_file, save_file

        writer = self.build(dtype)
        weight, shift, x = self.tensors(size, dtype, bias)
        module = writer.quantize(self.layer, weight, shift)
        save_file({k: t.cpu() for k, t in writer.pack(module).items()}, tmp_path / "packed.safetensors")
        reader = self.reader(writer, dtype)
        again = reader.unpack(self.layer, load_file(tmp_path / "packed.safetensors")).to(self.device)
        assert torch.equal(again(x), module(x))
        for name, tensor in writer.pack(module).items():
            both = [t.flatten().view(torch.uint8) for t in (reader.pack(again)[name], tensor)]  # float8 has no `equal`
            assert torch.equal(*both), f"{name} differs after a round trip"

    def test_tensor_names_are_the_keys_of_pack(self, bias: bool) -> None:
        """For the writer, and for a reader that knows the config alone."""
        writer = self.build()
        names = set(writer.pack(self.quantized(self.dtypes()[0], bias, writer)))
        for quantizer in (writer, self.reader(writer, self.dtypes()[0])):
            if isinstance(quantizer, PublishedQuantizer):  # what a layer has shows in the file
                listed = quantizer.stored_names(self.layer, self.layer, frozenset(names))
            else:
                listed = quantizer.tensor_names(self.layer)
            assert len(set(listed)) == len(listed)
            assert set(listed) == names, f"tensor_names says {sorted(listed)}, pack gives {sorted(names)}"
        assert not any("." in name for name in names if not name.startswith("weight."))

    def reader(self, writer: Quantizer, dtype: str) -> Quantizer:
        """The quantizer that a load of what `writer` saved would build."""
        request = QuantizerRequest(device=self.device, dtype=dtype, config=json.loads(json.dumps(writer.config())))
        quantizer: Quantizer = self.provider.pluglm_build_quantizer(request=request)
        return quantizer

    def test_a_whole_model_is_packed_saved_and_loaded_by_the_core(self, dtype: str) -> None:
        """Two layers, the second with a bias, under names of the checkpoint's own."""
        widths = self.sizes[0][1], self.sizes[0][0]
        table = {"model.a.weight": "a.weight", "model.b.weight": "b.weight", "model.b.bias": "b.bias"}
        weights = WeightMap(tuple(rules(table)), prefixes=("model.", ""))
        torch.manual_seed(0)
        plain = {"model.a.weight": torch.randn(widths[::-1]), "model.b.weight": torch.randn(widths)}
        plain["model.b.bias"] = torch.randn(widths[0])
        writer = self.build(dtype)
        module = self._loaded(weights, plain, dtype, writer, packed=False)
        saved = {name: tensor.clone().cpu() for name, tensor in export_weights(module, weights, writer)}
        again = self._loaded(weights, saved, dtype, self.reader(writer, dtype), packed=True)
        x = torch.randn(3, widths[0]).to(device=self.device, dtype=getattr(torch, dtype))
        assert torch.equal(again(x), module(x))

    def _loaded(
        self, weights: WeightMap, tensors: Mapping[str, Tensor], dtype: str, quantizer: Quantizer, *, packed: bool
    ) -> nn.Module:
        width, inner = self.sizes[0][1], self.sizes[0][0]
        module = nn.Sequential()
        with torch.device("meta"):
            module.add_module("a", nn.Linear(width, inner, bias=False))
            module.add_module("b", nn.Linear(inner, width))
        self._fill(module, weights, tensors, dtype, quantizer, packed=packed)
        return module

    def _fill(
        self, module: nn.Module, weights: WeightMap, tensors: Mapping[str, Tensor], dtype: str, quantizer: Quantizer,
        *, packed: bool,
    ) -> None:  # fmt: skip
        load_weights(
            module, weights, _InMemory(tensors, {"quantization_config": quantizer.config()} if packed else {}),
            device=self.device, dtype=getattr(torch, dtype), quantizer=quantizer, packed=packed,
        )  # fmt: skip

    # What its layers offer to executors (`pluglm.contracts.packed`). Both forms are optional.

    def offering(self, form: type, size: tuple[int, int], dtype: str, bias: bool) -> tuple[Quantizer, Any]:
        """A quantizer and a replacement that has the form; the test is skipped if its layers do not."""
        quantizer = self.build(dtype)
        weight, shift, _ = self.tensors(size, dtype, bias)
        module = quantizer.quantize(self.layer, weight, shift)
        if not isinstance(module, form):
            pytest.skip(f"its layers are no {form.__name__}")
        return quantizer, module

    def test_the_offered_weight_is_what_the_layer_multiplies_by(
        self, size: tuple[int, int], dtype: str, bias: bool
    ) -> None:
        """Up to the rounding of the compute dtype, and of float32, in which it is offered."""
        _, module = self.offering(GroupedLinear, size, dtype, bias)
        _, shift, x = self.tensors(size, dtype, bias)
        want = x.double() @ module.grouped().dense().double().T + (shift.double() if shift is not None else 0)
        numerics = self.facts().get("numerics", {}) if self.rounds_inputs else {}
        relative = max(numerics.get("rtol", 0.0), 1e-5, 4 * torch.finfo(x.dtype).eps)
        limit = numerics.get("atol", 0.0) + relative * float(want.abs().max())
        error = float((module(x).double() - want).abs().max())
        assert error <= limit, f"forward is off by {error:.3g} from the product with grouped(), more than {limit:.3g}"

    def test_the_offered_weight_is_well_formed(self, size: tuple[int, int], bias: bool) -> None:
        """Codes within their bits, scales and offsets for each group, and the bias that was given."""
        dtype, (out_features, in_features) = self.dtypes()[0], size
        _, module = self.offering(GroupedLinear, size, dtype, bias)
        weight, offered = module.grouped(), module.grouped_bias()
        assert 1 <= weight.bits <= 8
        assert in_features % weight.group_size == 0
        assert weight.codes.dtype in (torch.int8, torch.uint8), f"codes are {weight.codes.dtype}"
        assert weight.codes.shape == size
        low = -(1 << (weight.bits - 1)) if weight.codes.dtype is torch.int8 else 0
        found = int(weight.codes.min()), int(weight.codes.max())
        assert low <= found[0] <= found[1] < low + (1 << weight.bits), f"codes of {weight.bits} bits are {found}"
        for tensor in (weight.scale, weight.offset):
            assert tensor is None or tensor.dtype is torch.float32
            assert tensor is None or tensor.shape == (out_features, in_features // weight.group_size)
        shift = self.tensors(size, dtype, bias)[1]
        assert offered is None if shift is None else torch.equal(offered, shift)

    def test_offered_blocks_are_the_layers_own_tensors_before_and_after_a_round_trip(
        self, size: tuple[int, int], dtype: str
    ) -> None:
        """An executor reads them where they lie; what comes back from a file is the same blocks."""
        writer, module = self.offering(BlockedLinear, size, dtype, bias=True)
        again = self.reader(writer, dtype).unpack(self.layer, {k: t.clone() for k, t in writer.pack(module).items()})
        assert isinstance(again, BlockedLinear), "what unpack gives is no BlockedLinear"
        for layer in (module, again.to(self.device)):
            blocks = layer.blocks
            assert (blocks.rows, blocks.columns) == size
            held = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
            for short in ("codes", "scale", "offset"):
                tensor, first = getattr(blocks, short), getattr(module.blocks, short)
                assert (tensor is None) == (first is None), f"{short} is there before or after the round trip alone"
                if tensor is not None:
                    assert tensor.is_contiguous(), f"{short} is not contiguous"
                    assert tensor.untyped_storage().data_ptr() in held, f"{short} is a copy"
                    assert torch.equal(tensor, first), f"{short} differs after a round trip"
            said, weight = blocks.grouped().dense(), layer.grouped().dense()
            assert torch.allclose(said, weight, rtol=1e-3, atol=1e-6), "blocks and grouped() are different weights"

    # Token tables, of a `TableQuantizer`.

    def packs_tables(self, dtype: str) -> TableQuantizer:
        """The quantizer; the test is skipped if it packs no tables."""
        quantizer = self.build(dtype)
        if not isinstance(quantizer, TableQuantizer):
            pytest.skip("it packs no token tables")
        return quantizer

    def packed_table(self, quantizer: TableQuantizer, size: tuple[int, int], dtype: str) -> Any:
        """A table of [V, C] = size; asked for as the core asks."""
        assert quantizer.table_refusal(self.table, size[1], size[0]) is None
        module = quantizer.quantize_table(self.table, self.tensors(size, dtype, bias=False)[0])
        assert isinstance(module, BlockedEmbedding), "what quantize_table gives is no BlockedEmbedding"
        return module

    def test_a_table_looks_up_and_multiplies_by_what_its_blocks_say(self, size: tuple[int, int], dtype: str) -> None:
        """Every row, the last one included, in any shape; with and without a bias; near the table that was given."""
        module = self.packed_table(self.packs_tables(dtype), size, dtype)
        given, shift, x = self.tensors(size, dtype, bias=True)
        said, numerics = module.blocks.grouped().dense().double(), self.facts().get("numerics", {})
        assert torch.allclose(module.grouped().dense().double(), said, rtol=1e-3, atol=1e-6)
        eps = max(1e-5, 4 * torch.finfo(x.dtype).eps)
        ids = torch.arange(size[0], device=self.device)
        rows = module.forward(ids)
        assert rows.shape == size, f"looking up {size[0]} rows gave {tuple(rows.shape)}"
        assert rows.dtype == x.dtype, f"rows are {rows.dtype}, the compute dtype is {x.dtype}"
        assert (rows.double() - said).abs().max() <= eps * said.abs().max(), "rows are not those of the blocks"
        assert (said - given.double()).abs().max() <= numerics.get("rtol", 0.0) * given.double().abs().max()
        some = torch.tensor([[0, size[0] - 1, 1], [2, 0, size[0] - 1]], device=self.device)
        assert torch.equal(module.forward(some), rows[some])
        for bias in (None, shift):
            want = x.double() @ said.T + (0 if bias is None else bias.double())
            got = module.project(x, bias)
            assert got.shape == want.shape
            assert got.dtype == x.dtype
            assert (got.double() - want).abs().max() <= eps * want.abs().max(), "project is not the product with blocks"

    def test_a_table_holds_its_blocks_and_comes_back_from_its_tensors(self, size: tuple[int, int], dtype: str) -> None:
        """Under the names that a reader of the config lists; it has no parameter called weight."""
        writer = self.packs_tables(dtype)
        module = self.packed_table(writer, size, dtype)
        tensors = {name: tensor.clone() for name, tensor in writer.pack(module).items()}
        reader: Any = self.reader(writer, dtype)
        assert reader.table_refusal(self.table, size[1], size[0]) is None
        assert set(reader.tensor_names(self.table)) == tensors.keys()
        again = reader.unpack_table(self.table, tensors).to(self.device)
        for table in (module, again):
            assert not {name for name, _ in table.named_parameters(recurse=False)} & {"weight", "bias"}
            assert (table.blocks.rows, table.blocks.columns) == size
            held = {t.untyped_storage().data_ptr() for t in (*table.parameters(), *table.buffers())}
            for short in ("codes", "scale", "offset"):
                tensor, first = getattr(table.blocks, short), getattr(module.blocks, short)
                assert (tensor is None) == (first is None), f"{short} is there before or after the round trip alone"
                if tensor is not None:
                    assert tensor.untyped_storage().data_ptr() in held, f"{short} is a copy"
                    assert torch.equal(tensor, first), f"{short} differs after a round trip"

    def test_a_tied_table_is_packed_saved_and_loaded_by_the_core(self, dtype: str) -> None:
        """Its head is told, and multiplies by the packed one."""
        self.packs_tables(dtype)
        (rows, width), weights = self.sizes[0], WeightMap(tuple(rules({"wte.weight": "embed.weight"})))
        plain = {"wte.weight": self.tensors((rows, width), "float32", bias=False)[0].cpu()}
        writer = self.build(dtype)
        module, again = _Tied(rows, width), _Tied(rows, width)
        self._fill(module, weights, plain, dtype, writer, packed=False)
        saved = {name: tensor.clone().cpu() for name, tensor in export_weights(module, weights, writer)}
        assert "wte.weight" not in saved, "the table was not packed"
        self._fill(again, weights, saved, dtype, self.reader(writer, dtype), packed=True)
        packed: Any = module.embed
        ids = torch.tensor([[0, rows - 1, 3]], device=self.device)
        assert module.head.table is module.embed
        assert torch.equal(again(ids), module(ids))
        assert torch.equal(module(ids), packed.project(packed(ids)))

    def test_a_refusal_of_a_table_is_a_reason_or_none(self) -> None:
        """An empty reason tells nobody anything."""
        quantizer = self.packs_tables(self.dtypes()[0])
        for columns, rows in ((1, 1), (13, 7), (64, 1000)):
            reason = quantizer.table_refusal(self.table, columns, rows)
            assert reason is None or (type(reason) is str and reason != "")

    # What it says of itself.

    def test_the_object_says_what_the_manifest_says(self) -> None:
        """Its name is the listed one, and the Protocol is complete."""
        quantizer = self.build()
        assert isinstance(quantizer, Quantizer)
        assert quantizer.name == self.facts()["name"]
        assert 0 < quantizer.bits < 32

    def test_the_config_is_json_and_names_the_provider(self) -> None:
        """`quant_method` is how a load finds this plugin again."""
        quantizer = self.build()
        self.quantized(self.dtypes()[0], bias=True, quantizer=quantizer)
        config = quantizer.config()
        assert json.loads(json.dumps(config, allow_nan=False)) == config
        assert config["quant_method"] == self.facts()["name"]

    def test_a_refusal_is_a_reason_or_none(self) -> None:
        """The layers of this kit are taken; of any other, an empty reason tells nobody anything."""
        quantizer = self.build()
        for out_features, in_features in self.sizes:
            assert quantizer.refusal(self.layer, in_features, out_features) is None
        for name, in_features, out_features in (("head", 64, 1000), (self.layer, 1, 1), (self.layer, 7, 13)):
            reason = quantizer.refusal(name, in_features, out_features)
            assert reason is None or (type(reason) is str and reason != "")

    # What it refuses.

    def test_an_unknown_variant_or_option_is_refused_by_name(self) -> None:
        """All in one go: `.reasons` holds every reason, not only the first."""
        wrong: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
            (("no-such-variant",), {"variant": "no-such-variant"}),
            (("no_such_option",), {"options": (("no_such_option", 1),)}),
            (("no-such-variant", "first", "second"), {
                "variant": "no-such-variant", "options": (("first", 1), ("second", 2)),
            }),
        )  # fmt: skip
        for words, request in wrong:
            with pytest.raises(UnsupportedRequestError) as caught:
                self.build(**request)
            for word in words:
                assert any(word in reason for reason in caught.value.reasons), f"no reason names {word}"
                assert word in str(caught.value), f"the message does not name {word}"
            assert caught.value.fix

    def test_a_dtype_that_is_not_listed_is_refused_by_name(self, unlisted: str) -> None:
        """The manifest and the hook agree."""
        with pytest.raises(UnsupportedRequestError) as caught:
            self.build(unlisted)
        assert any(unlisted in reason for reason in caught.value.reasons)


class _Tied(nn.Module):
    """A table and the head that reads it, on the meta device."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, width, _weight=torch.empty(rows, width, device="meta"))
        self.head = _Head(self.embed)

    def forward(self, token_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(token_ids))
        return logits


class _Head(nn.Module):
    """A `TableReader`, once its table is packed."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.take_table(table)

    @property
    def table(self) -> nn.Module:
        table: nn.Module = self._table[0]
        return table

    def take_table(self, table: nn.Module) -> None:
        self._table: tuple[Any] = (table,)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self._table[0].project(x)
        return logits


class _InMemory:
    """A checkpoint that is not in a folder."""

    path = Path("memory")
    generation_config: dict[str, Any] | None = None
    fingerprint = "0"

    def __init__(self, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> None:
        names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.float16: "F16"}
        self.config, self._held = config, tensors
        self.tensors = {name: _Info(tuple(t.shape), names.get(t.dtype, "I8")) for name, t in tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._held[name]

    def file(self, name: str) -> Path | None:
        return None


class _Info:
    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
