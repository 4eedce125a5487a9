"""The reference side of the parity checks: transformers in float32 over a GGUF file's dequantised weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch  # pyright: ignore[reportMissingImports]  # comes with the extra parity
from prompts import Prompt
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

# GGUF tensor name → Hugging Face name, for the two families under test ({} is the layer).
_LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_OUTER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class Reference:
    """A transformers model and its tokenizer."""

    model: Any
    tokenizer: Any

    def render(self, prompt: Prompt) -> str:
        """The prompt's text, conversations through the model's chat template."""
        if isinstance(prompt.content, str):
            return prompt.content
        return self.tokenizer.apply_chat_template(
            list(prompt.content), tokenize=False, add_generation_prompt=True
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt; the template has put in what special tokens belong there."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


@dataclass(frozen=True)
class Score:
    """What the reference says of one sequence, prompt and answer in one forward pass."""

    token_logprobs: np.ndarray  # [T - 1] of token i + 1 given tokens 0..i
    gaps: np.ndarray  # [T - 1] top logit minus the second
    best_ids: np.ndarray  # [T - 1]
    top_ids: np.ndarray  # [T - 1, k]
    top_logits: np.ndarray  # [T - 1, k]
    log_sum_exp: np.ndarray  # [T - 1]: a logit minus this is a log-probability


def load_reference(gguf_path: Path) -> Reference:
    """Load the model in float32 and make sure that its weights are exactly what `gguf` dequantises."""
    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    if _word_rule(gguf_path) == "smollm":
        # transformers takes GPT-2's word rule for every GGUF tokenizer of that kind; SmolLM2's own
        # tokenizer.json cuts digits apart first, which decides where the spaces before a number go.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    model = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent,
        gguf_file=gguf_path.name,
        dtype=torch.float32,
        attn_implementation="eager",  # every sum spelled out in float32
    )
    model.eval()
    check_weights(model, gguf_path)
    return Reference(model, tokenizer)


def check_weights(model: Any, gguf_path: Path) -> None:
    """Raise ValueError unless parameters and dequantised tensors are the same, one to one and bit for bit."""
    reader = gguf.GGUFReader(gguf_path)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = set(parameters)
    for tensor in reader.tensors:
        name = _hugging_face_name(tensor.name)
        if name not in parameters:
            raise ValueError(f"{gguf_path.name}: the reference has no parameter for {tensor.name}")
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if model.config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
            want = _unpermute(want, heads)
        if not np.array_equal(parameters[name].detach().numpy(), want):
            raise ValueError(f"{gguf_path.name}: {name} differs from its dequantised tensor")
        missing.discard(name)
    if model.config.tie_word_embeddings:
        if model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr():
            raise ValueError(f"{gguf_path.name}: embeddings should be tied and are not")
        missing.discard("lm_head.weight")
    if missing:
        raise ValueError(f"{gguf_path.name}: no tensor for {sorted(missing)[:5]}")


@torch.inference_mode()
def greedy(model: Any, prompts: Sequence[Sequence[int]], num_tokens: int, batch_size: int) -> list[list[int]]:
    """`num_tokens` greedy tokens for every prompt, end tokens ignored; prompts of like length share a batch.

    Batches are padded on the left and masked, so an answer may differ from an unpadded run where two logits
    are all but equal; `score` runs without padding and has the last word.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, i in enumerate(rows):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[row, longest - len(prompts[i]) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = None
        for _ in range(num_tokens):
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1
            for row, i in enumerate(rows):
                answers[i].append(int(ids[row]))
    return answers


@torch.inference_mode()
def score(model: Any, token_ids: Sequence[int], num_top: int) -> Score:
    """One unpadded, uncached forward pass over a sequence of at least two tokens."""
    logits = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0, :-1].float()
    log_sum_exp = logits.logsumexp(-1)
    chosen = logits.gather(-1, torch.tensor(list(token_ids[1:])).unsqueeze(-1)).squeeze(-1)
    top = logits.topk(max(num_top, 2), dim=-1)
    return Score(
        token_logprobs=(chosen - log_sum_exp).numpy(),
        gaps=(top.values[:, 0] - top.values[:, 1]).numpy(),
        best_ids=top.indices[:, 0].numpy(),
        top_ids=top.indices[:, :num_top].numpy(),
        top_logits=top.values[:, :num_top].numpy(),
        log_sum_exp=log_sum_exp.numpy(),
    )


def _word_rule(gguf_path: Path) -> str:
    """Which rule cuts text into words before the merges, by llama.cpp's name."""
    field = gguf.GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field is not None else ""


def _hugging_face_name(name: str) -> str:
    if name in _OUTER_TENSORS:
        return _OUTER_TENSORS[name]
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_TENSORS:
        return f"model.layers.{parts[1]}.{_LAYER_TENSORS[parts[2]]}"
    raise ValueError(f"no Hugging Face name for GGUF tensor {name!r}")


def _unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's pairing of rotary channels: rows (i, half) of each head become (half, i) again."""
    rows, columns = weight.shape
    half = rows // num_heads // 2
    return weight.reshape(num_heads, half, 2, columns).swapaxes(1, 2).reshape(rows, columns)
