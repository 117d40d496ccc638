"""Which tensor is which parameter: one table a network, in Hugging Face's names and in LAVIS's.

Sources: transformers' ``InstructBlipForConditionalGeneration`` (the same names from 4.31 to 5.x);
``lavis/models/eva_vit.py``, ``blip2_models/Qformer.py`` and ``blip2_vicuna_instruct.py``; MA-LMM
adds ``image_pe``, our temporal table.
"""

import re

from adacm2_jax.config import AdaCM2Config, LlamaConfig, QFormerConfig, VisionConfig
from adacm2_jax.port.rules import CONV, FLAT, FROM_HEADS, LINEAR, SAME, Layout, Rule, Table

#: The tensors of attention's rotary positions, which old checkpoints carry.
_ROTARY = (
    r"(language_model\.|llm_model\.)?(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    "a buffer: rotary frequencies",
)
_IGNORED_HF = (
    (r"qformer\.embeddings\.position_ids", "a buffer: 0, 1, 2, …"),
    _ROTARY,
)
_IGNORED_LAVIS = (
    (r"Qformer\.bert\.embeddings\.position_ids", "a buffer: 0, 1, 2, …"),
    _ROTARY,
    (r"Qformer\.cls\..*", "BERT's language-model head, which InstructBLIP removes"),
    (r"visual_encoder\.(norm|fc_norm|head)\..*", "EVA-CLIP's own tail, which LAVIS cuts off"),
)


def hf_table(config: AdaCM2Config) -> Table:
    """``InstructBlipForConditionalGeneration``. It has no temporal table."""
    packed = "vision_model.encoder.layers.{}.self_attn.qkv.bias"
    rules = _rules(
        config, {"query": (packed, (0, 3)), "value": (packed, (2, 3))}, "language_model."
    )
    zeros = {packed.format(i): (1, 3) for i in range(config.vision.depth)}
    copies = _tied_head(config.llm, "llm/", "language_model.")
    return Table(rules, zeros, _IGNORED_HF, ("temporal_embed",), copies)


def lavis_table(config: AdaCM2Config) -> Table:
    """LAVIS's InstructBLIP as one model, and MA-LMM, which adds the temporal table."""
    block, depth = "visual_encoder.blocks.{}.attn.", config.vision.depth
    biases = {"query": (f"{block}q_bias", (0, 1)), "value": (f"{block}v_bias", (0, 1))}
    rules = tuple(_renamed(rule) for rule in _rules(config, biases, "llm_model."))
    last = ((rf"visual_encoder\.blocks\.{depth}\..*", "EVA-CLIP's last block"),)
    cut = last if depth == 39 else ()  # LAVIS builds 39 of the 40
    copies = _tied_head(config.llm, "llm/", "llm_model.")
    return Table(rules, {}, _IGNORED_LAVIS + cut, ("temporal_embed",), copies)


def llama_table(config: LlamaConfig) -> Table:
    """A bare ``LlamaForCausalLM``; paths of ours start at the language model."""
    rules, copies = llama_rules(config, "", ""), _tied_head(config, "", "")
    return Table(tuple(rules), ignored=(_ROTARY,), copies=copies)


def llama_rules(c: LlamaConfig, ours: str, theirs: str) -> list[Rule]:
    layers = tuple(range(c.depth))
    rows = [
        ("attention_norm/scale", "input_layernorm", SAME),
        ("query/kernel", "self_attn.q_proj", LINEAR),
        ("key/kernel", "self_attn.k_proj", LINEAR),
        ("value/kernel", "self_attn.v_proj", LINEAR),
        ("out/kernel", "self_attn.o_proj", FROM_HEADS),
        ("mlp_norm/scale", "post_attention_layernorm", SAME),
        ("gate/kernel", "mlp.gate_proj", LINEAR),
        ("up/kernel", "mlp.up_proj", LINEAR),
        ("down/kernel", "mlp.down_proj", LINEAR),
    ]
    rules = [
        Rule(f"{ours}layers/{path}", f"{theirs}model.layers.{{}}.{name}.weight", layout, layers)
        for path, name, layout in rows
    ]
    rules += [
        Rule(f"{ours}token_embed", f"{theirs}model.embed_tokens.weight", SAME),
        Rule(f"{ours}norm/scale", f"{theirs}model.norm.weight", SAME),
    ]
    if not c.tie_embeddings:
        rules.append(Rule(f"{ours}lm_head/kernel", f"{theirs}lm_head.weight", LINEAR))
    return rules


def _rules(
    config: AdaCM2Config, biases: dict[str, tuple[str, tuple[int, int]]], llm: str
) -> tuple[Rule, ...]:
    """All of ours, by Hugging Face's names.

    Args:
      config: the model.
      biases: of the ViT's query and value: the tensor, and which part of it.
      llm: what stands before the names of the language model.
    """
    layers = tuple(range(config.vision.depth))
    return (
        *_vision(config.vision),
        *(
            Rule(f"vision/blocks/{ours}/bias", theirs, FLAT, layers, part)
            for ours, (theirs, part) in biases.items()
        ),
        *_norm("ln_vision", "vision_model.post_layernorm", None),
        *_linear("language_projection/", "language_projection", LINEAR, SAME),
        *_qformer(config.qformer),
        *llama_rules(config.llm, "llm/", llm),
        Rule("temporal_embed", "image_pe.weight", SAME),
    )


def _vision(c: VisionConfig) -> list[Rule]:
    """EVA's ViT, without the biases of query and value, which Hugging Face packs."""
    theirs, layers = "vision_model.encoder.layers.{}.", tuple(range(c.depth))
    rules = [
        Rule("vision/cls_token", "vision_model.embeddings.class_embedding", SAME),
        Rule("vision/pos_embed", "vision_model.embeddings.position_embedding", SAME),
        Rule("vision/patch_embed/kernel", "vision_model.embeddings.patch_embedding.weight", CONV),
        Rule("vision/patch_embed/bias", "vision_model.embeddings.patch_embedding.bias", SAME),
    ]
    qkv = f"{theirs}self_attn.qkv.weight"
    for i, name in enumerate(("query", "key", "value")):
        rules.append(Rule(f"vision/blocks/{name}/kernel", qkv, LINEAR, layers, (i, 3)))
    for path, name, layout in (
        ("out", "self_attn.projection", FROM_HEADS),
        ("mlp/up", "mlp.fc1", LINEAR),
        ("mlp/down", "mlp.fc2", LINEAR),
    ):
        rules += _linear(f"vision/blocks/{path}/", f"{theirs}{name}", layout, SAME, layers)
    for path, name in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
        rules += _norm(f"vision/blocks/{path}", f"{theirs}{name}", layers)
    return rules


def _qformer(c: QFormerConfig) -> list[Rule]:
    theirs, every = "qformer.encoder.layer.{}.", c.cross_attention_every
    reading = tuple(range(0, c.depth, every))
    rules = [
        Rule("qformer/query_tokens", "query_tokens", SAME),
        Rule("qformer/word_embed", "qformer.embeddings.word_embeddings.weight", SAME),
        Rule("qformer/pos_embed", "qformer.embeddings.position_embeddings.weight", SAME),
        *_norm("qformer/norm", "qformer.embeddings.layernorm", None),
    ]

    def attention(path: str, name: str, inputs: tuple[str, ...], layers) -> None:
        for kind in inputs:
            source = f"{theirs}{name}.attention.{kind}"
            rules.extend(_linear(f"{path}/{kind}/", source, LINEAR, FLAT, layers))
        source = f"{theirs}{name}.output"
        rules.extend(_linear(f"{path}/out/", f"{source}.dense", FROM_HEADS, SAME, layers))
        rules.extend(_norm(f"{path}/norm", f"{source}.LayerNorm", layers))

    attention("qformer/groups/cross_attention", "crossattention", ("query",), reading)
    for kind in ("key", "value"):
        source = f"{theirs}crossattention.attention.{kind}"
        path = f"qformer/frame_projection/{kind}_"
        rules += _linear(path, source, LINEAR, FLAT, reading)
    for i in range(every):
        layers = tuple(first + i for first in reading)
        path = f"qformer/groups/self_attention_{i}"
        attention(path, "attention", ("query", "key", "value"), layers)
        for branch, suffix in (("query", "_query"), ("text", "")):
            path = f"qformer/groups/{branch}_ffn_{i}"
            for part, name in (("up", "intermediate"), ("down", "output")):
                source = f"{theirs}{name}{suffix}.dense"
                rules += _linear(f"{path}/mlp/{part}/", source, LINEAR, SAME, layers)
            rules.extend(_norm(f"{path}/norm", f"{theirs}output{suffix}.LayerNorm", layers))
    return rules


def _linear(
    path: str, name: str, kernel: Layout, bias: Layout, layers: tuple[int, ...] | None = None
) -> list[Rule]:
    return [
        Rule(f"{path}kernel", f"{name}.weight", kernel, layers),
        Rule(f"{path}bias", f"{name}.bias", bias, layers),
    ]


def _norm(path: str, name: str, layers: tuple[int, ...] | None) -> list[Rule]:
    return [
        Rule(f"{path}/scale", f"{name}.weight", SAME, layers),
        Rule(f"{path}/bias", f"{name}.bias", SAME, layers),
    ]


def _tied_head(c: LlamaConfig, ours: str, theirs: str) -> dict[str, str]:
    return {f"{theirs}lm_head.weight": f"{ours}token_embed"} if c.tie_embeddings else {}


#: Hugging Face's name of a tensor → LAVIS's, applied in order.
_TO_LAVIS = (
    (r"^vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
    (r"^vision_model\.post_layernorm", "ln_vision"),
    (r"^vision_model\.encoder\.layers", "visual_encoder.blocks"),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.qkv", ".attn.qkv"),
    (r"\.self_attn\.projection", ".attn.proj"),
    (r"^qformer\.embeddings\.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    (r"^qformer\.", "Qformer.bert."),
    (r"attention\.attention\.", "attention.self."),
    (r"^language_projection", "llm_proj"),
)


def _renamed(rule: Rule) -> Rule:
    name = rule.theirs
    for pattern, replacement in _TO_LAVIS:
        name = re.sub(pattern, replacement, name)
    return Rule(rule.ours, name, rule.layout, rule.layers, rule.part)
