"""What transformers' generation tests ask of a model, which its source distribution leaves out; written for Oryx.

Each case runs once per mixer and mode plan, beside transformers' own (suite.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache

from oryx_megatron.hf.configuration_oryx import OryxConfig
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM

GREEDY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
BATCH, PROMPT = 2, 7


class GenerationCases:
    """Mixed into a case that has a `model_tester`."""

    def _model(self, attn: str = "sdpa") -> OryxForCausalLM:
        config: OryxConfig = self.model_tester.get_config()  # type: ignore[attr-defined]
        config.initializer_range = 0.3  # texts that differ
        config.pad_token_id = config.eos_token_id = None  # and neither end nor hold padding
        torch.manual_seed(0)
        model = OryxForCausalLM._from_config(config, attn_implementation=attn).eval()
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def _ids(self, model: OryxForCausalLM, seed: int = 1) -> Tensor:
        ids = torch.randint(3, 99, (BATCH, PROMPT), generator=torch.Generator().manual_seed(seed))
        return ids.to(model.device)

    @staticmethod
    def _same(one, two) -> None:
        assert torch.equal(one.sequences, two.sequences)
        torch.testing.assert_close(torch.stack(one.logits), torch.stack(two.logits), atol=1e-4, rtol=1e-3)

    def test_generate_continues_from_past_key_values(self) -> None:
        """Three tokens and one more are four, for token ids and embeddings, and both forms of the cache."""
        model = self._model()
        ids, embed = self._ids(model), model.get_input_embeddings()
        for embedded in (False, True):
            for form in (None, "static"):
                options = GREEDY | {"cache_implementation": form, "max_cache_len": 16 if form else None}

                def inputs(text: Tensor, embedded: bool = embedded) -> dict:
                    return {"inputs_embeds": embed(text)} if embedded else {"input_ids": text}

                whole = model.generate(**inputs(ids), max_new_tokens=4, **options)
                first = model.generate(**inputs(ids), max_new_tokens=3, **options)
                text = torch.cat([ids, first.sequences], 1) if embedded else first.sequences
                more = model.generate(**inputs(text), max_new_tokens=1, past_key_values=first.past_key_values, **GREEDY)
                assert torch.equal(more.sequences[:, -1], whole.sequences[:, -1])
                torch.testing.assert_close(more.logits[0], whole.logits[3], atol=1e-4, rtol=1e-3)

    def test_generate_with_either_cache_or_none(self) -> None:
        for dtype in (torch.float32, torch.float16):
            model = self._model().to(dtype)
            ids, new = self._ids(model), 20
            dynamic, static, none = (
                model.generate(ids, max_new_tokens=new, **GREEDY, **options)
                for options in ({}, {"cache_implementation": "static"}, {"use_cache": False})
            )
            assert isinstance(dynamic.past_key_values, DynamicCache)
            assert isinstance(static.past_key_values, StaticCache)
            assert len(static.past_key_values) == 2
            for layer in (*dynamic.past_key_values.layers, *static.past_key_values.layers):
                assert layer.keys.shape == (BATCH, 2, PROMPT + new - 1, 8)  # the last one is never read
            if dtype == torch.float32:
                self._same(static, dynamic)
                self._same(none, dynamic)

    def test_generate_from_embeddings_with_static_cache(self) -> None:
        model = self._model()
        ids = self._ids(model)
        out = model.generate(
            inputs_embeds=model.get_input_embeddings()(ids), max_length=20, cache_implementation="static", **GREEDY
        )
        assert out.past_key_values.layers[0].keys.shape == (BATCH, 2, 19, 8)
        tokens = model.generate(ids, max_length=20, **GREEDY)
        assert torch.equal(out.sequences, tokens.sequences[:, PROMPT:])

    def test_generate_compiles_once(self) -> None:
        """A whole step in one graph, and the second text runs what the first one compiled."""
        for attn, asked in (("sdpa", {}), ("eager", {"output_attentions": True, "output_hidden_states": True})):
            model = self._model(attn)
            torch.compiler.reset()
            compiled = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend="eager")
            compiled._compile_all_devices = True
            for seed, stance in ((1, "default"), (2, "fail_on_recompile")):
                ids = self._ids(model, seed)
                want = model.generate(ids, max_new_tokens=5, **GREEDY, **asked)
                with torch.compiler.set_stance(stance):
                    out = model.generate(
                        ids,
                        max_new_tokens=5,
                        cache_implementation="static",
                        compile_config=compiled,
                        **GREEDY,
                        **asked,
                    )
                self._same(out, want)

    def test_generate_returns_attentions_and_hidden_states(self) -> None:
        model = self._model("eager")
        ids, new = self._ids(model), 4
        for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            out = model.generate(
                ids, max_new_tokens=new, output_attentions=True, output_hidden_states=True, **GREEDY, **options
            )
            rows = BATCH * options.get("num_beams", 1)
            assert len(out.attentions) == len(out.hidden_states) == new
            for i, (weights, states) in enumerate(zip(out.attentions, out.hidden_states)):
                queries = PROMPT if i == 0 else 1
                keys = PROMPT + new - 1 if "cache_implementation" in options else PROMPT + i
                assert [tuple(w.shape) for w in weights] == [(rows, 4, queries, keys)] * 2
                assert [tuple(h.shape) for h in states] == [(rows, queries, 32)] * 3

    def test_generate_left_padded(self) -> None:
        model = self._model()
        ids = self._ids(model)
        padded = torch.nn.functional.pad(ids, (4, 0), value=0)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
        for options in ({}, {"cache_implementation": "static"}, {"num_beams": 3, "num_return_sequences": 2}):
            want = model.generate(ids, max_new_tokens=5, **GREEDY, **options).sequences
            found = model.generate(padded, attention_mask=mask, max_new_tokens=5, **GREEDY, **options).sequences
            assert torch.equal(found[:, 4:], want)

    def test_prepare_inputs_for_generation_forwards_what_it_does_not_know(self) -> None:
        model = self._model()
        ids = self._ids(model)
        given = {"position_ids": torch.arange(PROMPT)[None], "logits_to_keep": 1, "other": 3}
        inputs = model.prepare_inputs_for_generation(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
        assert given.keys() <= inputs.keys()

    def test_logits_to_keep(self) -> None:
        model = self._model()
        ids = self._ids(model)
        with torch.no_grad():
            whole = model(ids).logits
            for kept in (1, 3, torch.tensor([0, 4])):
                part = model(ids, logits_to_keep=kept).logits
                want = whole[:, -kept:] if isinstance(kept, int) else whole[:, kept]
                torch.testing.assert_close(part, want, atol=1e-5, rtol=1e-4)
        self._same(
            model.generate(ids, max_new_tokens=5, logits_to_keep=0, **GREEDY),
            model.generate(ids, max_new_tokens=5, **GREEDY),
        )
