"""Qwen3-VL from the image to the logits, for the steps of an attack, without what no step needs.

Between two steps only the image changes, and only its gradient is asked for. So here

- keys and values of the text before the image are computed once, and all rows begin with the image, flush left;
- queries, keys and values of the words in the first layer are computed once: no image has reached them yet;
- the last layer is computed at the columns that are read;
- query heads that share a key are one head of as many columns, and no key is copied for them;
- norms and rotary embeddings have a backward pass of their own (fused.py).

When it is taken, and how it is checked, is told in shortcut.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

from .fused import NormedRotary, RMSNorm, Rotary
from .loading import unwrapped
from .prefix import known_text
from .sequences import INPUTS

if TYPE_CHECKING:
    from .huggingface import HuggingFaceVLM

STOCK = (
    qwen.Qwen3VLForConditionalGeneration,
    qwen.Qwen3VLModel,
    qwen.Qwen3VLTextModel,
    qwen.Qwen3VLTextDecoderLayer,
    qwen.Qwen3VLTextAttention,
    qwen.Qwen3VLTextRMSNorm,
    qwen.Qwen3VLVisionModel,
    qwen.Qwen3VLVisionBlock,
    qwen.Qwen3VLVisionAttention,
)
"""What is passed over must be one of these, without a hook."""

HELD = 4
"""Layouts that are remembered: objectives may take turns."""


def strange(model: Any) -> str:
    """Why this is not the model that is computed here, '' where it is."""
    if type(model) is not qwen.Qwen3VLForConditionalGeneration:
        return "not a Qwen3-VL"
    changed = [type(module).__name__ for module in _passed_over(model) if not _is_stock(module)]
    return f"a {changed[0]} does something of its own" if changed else ""


def _passed_over(model: Any) -> Iterator[nn.Module]:
    """The modules whose own forward is not called, only that of their parts."""
    tower, text = model.model.visual, model.model.language_model
    yield from (model, model.model, tower, text, text.norm)
    for block in tower.blocks:
        yield from (block, block.attn)
    for layer in text.layers:
        own = layer.self_attn
        yield from (layer, own, own.q_norm, own.k_norm, layer.input_layernorm, layer.post_attention_layernorm)


def _is_stock(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) in STOCK and "forward" not in module.__dict__ and not any(hooks)


@dataclass(frozen=True)
class Layout:
    """What stays the same between the steps of B rows of n columns: I of the image, then the words.

    given: ids, mask and positions that it was made of. words: (B, n - I, d) embeddings. cos, sin: (B, n, 1, d_head).
    mask: (1, 1, G * n, p + n), added to the scores of the G query heads of a key; the keys of p columns are known.
    read: (B, keep) columns. last_mask: (B, 1, G * keep, p + n). first: the words' queries, keys and values in the first
    layer, (B, n - I, heads, d_head) each; () where it is the last one too.
    """

    given: tuple[Tensor, ...]
    words: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor
    read: Tensor
    last_mask: Tensor
    first: tuple[Tensor, ...]


class Pass:
    """What the steps of an attack have in common, and the rest of one step. Weights must not change meanwhile."""

    def __init__(self, vlm: HuggingFaceVLM) -> None:
        whole: Any = unwrapped(vlm.model)
        self.tower, self.text, self.head = whole.model.visual, whole.model.language_model, whole.lm_head
        self.image_token = whole.config.image_token_id
        self.before = torch.tensor(vlm.chat.before_image, device=vlm.device)
        self.known: list[Any] = known_text(vlm, vlm.chat.before_image).layers
        self.grid = vlm.pixel_map.extras(1)["image_grid_thw"]
        self.image = int(self.grid.prod()) // self.tower.spatial_merge_size**2
        self.places, self.angles = self._vision_positions()
        self.layouts: list[Layout] = []

    def __call__(self, inputs: dict[str, Tensor], pixel_values: Tensor, keep: int) -> Tensor | None:
        """(B, keep, V) logits at the last `keep` columns of left-padded inputs. None where a row is anything else than
        the text that is known, one image, and words, and under autocast."""
        autocast = torch.is_autocast_enabled(pixel_values.device.type)
        layout = None if autocast else self._layout(inputs, keep)
        if layout is None:
            return None
        image, deep = self._see(pixel_values, len(layout.words))
        logits: Tensor = self.head(_norm(self.text.norm, self._read(layout, image, deep)))
        return logits.float()

    # -- the image -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _vision_positions(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(N, d) position embeddings of an image's N patches; cos and sin (N, 1, 1, d_head)."""
        tower = self.tower
        corners, weights = qwen.get_vision_interpolation_indices_and_weights(
            self.grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.config.spatial_merge_size,
        )
        places = (tower.pos_embed(corners) * weights[:, :, None]).sum(1)
        cos, sin = tower.rotary_pos_emb(places, qwen.get_vision_position_ids(self.grid, tower.spatial_merge_size))
        return places, (cos[:, None, None], sin[:, None, None])

    def _see(self, pixel_values: Tensor, count: int) -> tuple[Tensor, list[Tensor]]:
        """(B, I, d) image tokens, and those that DeepStack adds behind the first layers (arXiv 2406.04334)."""
        tower, found = self.tower, []
        h = tower.patch_embed(pixel_values).view(count, *self.places.shape) + self.places
        for number, block in enumerate(tower.blocks):
            h = h + self._look(block.attn, block.norm1(h))
            h = h + block.mlp(block.norm2(h))
            if number in tower.deepstack_visual_indexes:
                merger = tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(number)]
                found.append(merger(h.flatten(0, 1)))
        image, *deep = (f.view(count, self.image, -1) for f in (tower.merger(h.flatten(0, 1)), *found))
        return image, deep

    def _look(self, own: Any, x: Tensor) -> Tensor:
        """Attention among an image's patches: (B, N, d) to (B, N, d)."""
        both, v = own.qkv(x).view(*x.shape[:2], 3, own.num_heads, -1).split((2, 1), 2)
        q, k = Rotary.apply(both, *self.angles).transpose(1, 3).unbind(2)
        out = scaled_dot_product_attention(q, k, v.squeeze(2).transpose(1, 2), scale=own.scaling)
        looked: Tensor = own.proj(out.transpose(1, 2).flatten(2))
        return looked

    # -- the words -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _layout(self, inputs: dict[str, Tensor], keep: int) -> Layout | None:
        given = tuple(inputs[name] for name in INPUTS)
        for held in self.layouts:
            if held.read.shape[1] == keep and all(map(torch.equal, held.given, given)):
                return held
        if (made := self._lay_out(given, keep)) is not None:
            self.layouts = [made, *self.layouts[: HELD - 1]]
        return made

    def _lay_out(self, given: tuple[Tensor, ...], keep: int) -> Layout | None:
        (ids, mask, positions), image, known = given, self.image, len(self.before)
        width, lengths = ids.shape[1], mask.sum(1, keepdim=True)
        column = torch.arange(width, device=ids.device)[None]
        inside = column < lengths
        flush = torch.where(inside, column + width - lengths, width - 1)  # nothing sees what is behind a row's end
        ids, positions = ids.gather(1, flush), positions.gather(2, flush[:, None].expand(-1, positions.shape[1], -1))
        is_image, expected = (ids == self.image_token) & inside, (column >= known) & (column < known + image)
        flush_right = torch.equal(mask.bool(), inside.flip(1))
        if not (flush_right and bool((is_image == expected).all()) and bool((ids[:, :known] == self.before).all())):
            return None
        words = self.text.embed_tokens(ids[:, known + image :])
        cos, sin = (a[:, :, None] for a in self.text.rotary_emb(words, positions[..., known:].transpose(0, 1)))
        seen = torch.ones(width - known, width, dtype=torch.bool, device=ids.device).tril(known)
        added = torch.zeros(seen.shape, device=ids.device).masked_fill_(~seen, -torch.inf)
        read = (lengths - known - keep + torch.arange(keep, device=ids.device)).clamp_(min=0)
        groups = self.text.layers[0].self_attn.num_key_value_groups
        first: tuple[Tensor, ...] = ()
        if len(self.text.layers) > 1:
            first = self._projected(0, words, cos[:, image:], sin[:, image:])
        mask, last_mask = added.repeat(groups, 1)[None, None], added[read].repeat(1, groups, 1)[:, None]
        return Layout(given, words, cos, sin, mask, read, last_mask, first)

    def _read(self, layout: Layout, image: Tensor, deep: list[Tensor]) -> Tensor:
        """(B, keep, d) hidden states behind the last layer, at the columns that are read."""
        h, last = torch.cat([image, layout.words], 1), len(self.text.layers) - 1
        for number, layer in enumerate(self.text.layers):
            q, k, v = self._heads(number, layout, image, h)
            if number == last:
                h = _columns(h, layout.read)
            h = h + self._attend(number, q, k, v, layout.last_mask if number == last else layout.mask)
            h = h + layer.mlp(_norm(layer.post_attention_layernorm, h))
            if number < min(len(deep), last):
                h = torch.cat([h[:, : self.image] + deep[number], h[:, self.image :]], 1)
        return h

    def _heads(self, number: int, layout: Layout, image: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (B, columns, heads, d_head); the last layer's queries as far as they are read."""
        cos, sin = layout.cos, layout.sin
        if number == 0 and layout.first:
            fresh = self._projected(0, image, cos[:, : self.image], sin[:, : self.image])
            return tuple(torch.cat(pair, 1) for pair in zip(fresh, layout.first, strict=True))
        return self._projected(number, h, cos, sin, layout.read if number == len(self.text.layers) - 1 else None)

    def _projected(
        self, number: int, h: Tensor, cos: Tensor, sin: Tensor, read: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Of (B, n, d) hidden states, or the queries of the columns `read` alone."""
        layer = self.text.layers[number]
        own, x = layer.self_attn, _norm(layer.input_layernorm, h)
        asking, angles = (
            (x, (cos, sin)) if read is None else (_columns(x, read), (_columns(cos, read), _columns(sin, read)))
        )
        q, k, v = (
            project(of).view(*of.shape[:2], -1, own.head_dim)
            for project, of in ((own.q_proj, asking), (own.k_proj, x), (own.v_proj, x))
        )
        q = NormedRotary.apply(q, own.q_norm.weight, own.q_norm.variance_epsilon, *angles)
        return q, NormedRotary.apply(k, own.k_norm.weight, own.k_norm.variance_epsilon, cos, sin), v

    def _attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """(B, columns, d) of `_heads`, with the keys and values that are known."""
        own = self.text.layers[number].self_attn
        keys, values = self.known[number].update(k.transpose(1, 2), v.transpose(1, 2))
        rows, count, heads = len(q), q.shape[1], keys.shape[1]
        grouped = q.view(rows, count, heads, -1, own.head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=own.scaling)
        back = out.view(rows, heads, -1, count, own.head_dim).permute(0, 3, 1, 2, 4)
        attended: Tensor = own.o_proj(back.flatten(2))
        return attended


def _norm(norm: Any, x: Tensor) -> Tensor:
    normed: Tensor = RMSNorm.apply(x, norm.weight, norm.variance_epsilon)
    return normed


def _columns(x: Tensor, at: Tensor) -> Tensor:
    """(B, keep, ...) of (B, n, ...) at (B, keep) columns."""
    return x[torch.arange(len(at), device=at.device)[:, None], at]
