"""A training forward of QwenImageTransformer2DModel that a compiler can fuse, over the stock module's own weights.

The same mathematics as the stock forward (a test holds them together), with real instead of complex rotary embedding
and one block function for all blocks, so that ``torch.compile`` compiles it once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]


class TrainingForward:
    """``forward(tokens, sigma, text, mask) -> velocity`` for a fixed number of text tokens.

    Parameters
    ----------
    model : QwenImageTransformer2DModel.
    img_shapes : as the model takes it, for one sample. text_tokens : padded length of every prompt.
    compile : compile the block with torch.compile.
    """

    def __init__(self, model, img_shapes, *, text_tokens: int, compile: bool = True) -> None:
        self.model = model
        self.text_tokens = text_tokens
        image, text = model.pos_embed(img_shapes, max_txt_seq_len=text_tokens, device=model.proj_out.weight.device)
        rotation = torch.cat((text, image))[:, None]
        self.cos, self.sin = rotation.real.contiguous(), rotation.imag.contiguous()
        self.image_tokens = len(image)
        self.blocks = [dict(block.named_parameters()) for block in model.transformer_blocks]
        self.block = torch.compile(_block, dynamic=False) if compile else _block

    def __call__(self, tokens: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, mask: torch.Tensor,
                 run: torch.Tensor | None = None) -> torch.Tensor:
        """tokens [B, S, C], sigma [B], text [B, T, J], mask bool [B, T] -> [B, S, C].

        ``run``, bool [blocks], says which blocks run; the others pass their streams on unchanged. None: all.
        """
        model = self.model
        image = model.img_in(tokens)
        text = model.txt_in(model.txt_norm(text))
        temb = model.time_text_embed(sigma, image)
        activated = F.silu(temb)
        padding = F.pad(~mask, (0, self.image_tokens))[:, None, None]
        bias = torch.zeros(padding.shape, dtype=image.dtype, device=image.device).masked_fill_(padding, -1e9)
        bias = bias.expand(-1, -1, padding.shape[-1], -1)
        for index, weights in enumerate(self.blocks):
            if run is None or run[index]:
                image, text = self.block(weights, image, text, activated, bias, self.cos, self.sin)
        return model.proj_out(model.norm_out(image, temb))


def _block(weights: Weights, image, text, activated, bias, cos, sin):
    shift_i, scale_i, gate_i, mlp_shift_i, mlp_scale_i, mlp_gate_i = _modulation(weights, "img_mod", activated)
    shift_t, scale_t, gate_t, mlp_shift_t, mlp_scale_t, mlp_gate_t = _modulation(weights, "txt_mod", activated)
    attended_text, attended_image = _attention(weights, _norm(image) * (1 + scale_i) + shift_i,
                                               _norm(text) * (1 + scale_t) + shift_t, bias, cos, sin)
    image = image + gate_i * attended_image
    text = text + gate_t * attended_text
    image = image + mlp_gate_i * _mlp(weights, "img_mlp", _norm(image) * (1 + mlp_scale_i) + mlp_shift_i)
    text = text + mlp_gate_t * _mlp(weights, "txt_mlp", _norm(text) * (1 + mlp_scale_t) + mlp_shift_t)
    return image, text


def _attention(weights: Weights, image, text, bias, cos, sin):
    head_dim = weights["attn.norm_q.weight"].shape[0]

    def heads(x, name):
        return _linear(weights, f"attn.{name}", x).unflatten(-1, (-1, head_dim))

    def normed(x, name):
        return F.rms_norm(x, (head_dim,), weights[f"attn.{name}.weight"], 1e-6)

    query = torch.cat((normed(heads(text, "add_q_proj"), "norm_added_q"), normed(heads(image, "to_q"), "norm_q")), 1)
    key = torch.cat((normed(heads(text, "add_k_proj"), "norm_added_k"), normed(heads(image, "to_k"), "norm_k")), 1)
    value = torch.cat((heads(text, "add_v_proj"), heads(image, "to_v")), 1)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
                                         attn_mask=bias).transpose(1, 2).flatten(2)
    length = text.shape[1]
    return _linear(weights, "attn.to_add_out", out[:, :length]), _linear(weights, "attn.to_out.0", out[:, length:])


def _modulation(weights: Weights, name: str, activated):
    return _linear(weights, f"{name}.1", activated)[:, None].chunk(6, -1)


def _mlp(weights: Weights, name: str, x):
    return _linear(weights, f"{name}.net.2", F.gelu(_linear(weights, f"{name}.net.0.proj", x), approximate="tanh"))


def _linear(weights: Weights, name: str, x):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _rotate(x, cos, sin):
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
