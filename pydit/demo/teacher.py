"""The demo's teacher: a stock diffusers QwenImagePipeline in miniature, and how its directory is put together.

Everything is built offline. The tokenizer is a byte-level BPE whose chat template prefix is exactly the 34 tokens that
the stock pipeline drops; every word of the world is one token, and so is the chat suffix. The text encoder is a
one-layer Qwen2.5-VL whose layer is the identity (zero output projections): its last hidden state is the RMS-normalised
token embedding, and the embedding is trained together with the transformer. Weights are stored in bfloat16 and load
as float32 by default, as diffusers does.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pydit.demo.render import SIZE
from pydit.demo.world import VOCABULARY, all_prompts

ASSETS = Path(__file__).parent / "assets" / "teacher"
HEAD_DIM = 32
LATENT_CHANNELS = 8
TEXT_WIDTH = 64
PREFIX = ("<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
          "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n")
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", SUFFIX)


def load_teacher(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
    """The committed teacher as a diffusers QwenImagePipeline."""
    from pydit.inference.pipeline import load_pipeline

    return load_pipeline(ASSETS, device=device, dtype=dtype)


def build_tokenizer():
    """A Qwen2Tokenizer over the world's words and the template, trained on nothing else."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pre_tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[]).backend_tokenizer.pre_tokenizer
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    corpus = [PREFIX, SUFFIX, *(prompt.text for prompt in all_prompts())]
    trained.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, show_progress=False, initial_alphabet=sorted(alphabet)))
    import json

    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]],
                               eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token=None)
    # Qwen's pre-tokenizer splits a digit from the space before it; as added tokens " 4" stays one token like " A".
    digits = [AddedToken(f" {word}", normalized=False) for word in VOCABULARY if word.isdigit()]
    tokenizer.add_tokens(digits)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    return tokenizer


def build_text_encoder(vocabulary_size: int, seed: int = 0):
    """Qwen2_5_VLForConditionalGeneration with one identity layer; returns it with a random embedding."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=vocabulary_size, hidden_size=TEXT_WIDTH, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
                         tie_word_embeddings=True, rms_norm_eps=1e-6, bos_token_id=0, eos_token_id=0, pad_token_id=0,
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}),
        vision_config=dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=TEXT_WIDTH,
                           patch_size=2, fullatt_block_indexes=[0]),
        tie_word_embeddings=True)
    torch.manual_seed(seed)
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    layer = encoder.model.language_model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    encoder.model.language_model.embed_tokens.weight.normal_()
    return encoder


def build_vae(seed: int = 0):
    """A 4x-downsampling AutoencoderKLQwenImage with 8 latent channels (470,147 parameters), untrained."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(seed)
    return AutoencoderKLQwenImage(base_dim=8, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 4], num_res_blocks=1,
                                  temperal_downsample=[False, True], latents_mean=[0.0] * LATENT_CHANNELS,
                                  latents_std=[1.0] * LATENT_CHANNELS)


def build_transformer(num_layers: int = 16, heads: int = 3, seed: int = 0):
    """A QwenImageTransformer2DModel with head size 32, untrained."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(seed)
    return QwenImageTransformer2DModel(patch_size=2, in_channels=4 * LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
                                       num_layers=num_layers, attention_head_dim=HEAD_DIM, num_attention_heads=heads,
                                       joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(8, 12, 12))


def assemble(transformer, vae, text_encoder, tokenizer):
    """A stock pipeline of these parts. The scheduler takes the sigmas it is given: no shift, as in training."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False)
    return QwenImagePipeline(scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
                             transformer=transformer)


def build_untrained(path: str | Path, *, num_layers: int = 16, heads: int = 3, seed: int = 0) -> Path:
    """Write a complete, untrained pipeline directory; for tests and as the start of training."""
    from pydit.files import replace_directory

    tokenizer = build_tokenizer()
    pipe = assemble(build_transformer(num_layers, heads, seed), build_vae(seed),
                    build_text_encoder(len(tokenizer), seed), tokenizer)
    with replace_directory(path) as new:
        pipe.save_pretrained(new)
    return Path(path)


__all__ = ["ASSETS", "SIZE", "assemble", "build_text_encoder", "build_tokenizer", "build_transformer",
           "build_untrained", "build_vae", "load_teacher"]
