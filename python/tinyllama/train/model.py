"""The Llama that is trained: the same computation as the native core, in torch, with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from ..config import Config, rope_tables
from ..errors import ArgumentError, FormatError, MissingExtraError

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.utils.checkpoint import checkpoint
except ImportError as error:
    raise MissingExtraError("torch", "train") from error

Tap = Callable[[str, Tensor], None]


class Layer(nn.Module):
    """One transformer block: attention, then a SwiGLU feed-forward net, each added to the stream.

    Matrices are stored as (out, in), under the names of ``Config.tensor_shapes()``.
    """

    attn_norm: Tensor
    wq: Tensor
    wk: Tensor
    wv: Tensor
    wo: Tensor
    ffn_norm: Tensor
    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor

    def __init__(self, config: Config, dropout: float, recompute: bool) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.recompute = recompute
        for name, shape in config.tensor_shapes().items():
            if name.startswith("layers.0."):
                empty = nn.Parameter(torch.ones(shape))
                self.register_parameter(name.removeprefix("layers.0."), empty)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor | None, tap: Tap
    ) -> Tensor:
        """``x`` (batch, n_tokens, dim) -> the same shape. ``hidden``: see :func:`mix_heads`."""
        if self.recompute and self.training:
            result: Tensor = checkpoint(
                self._forward, x, cos, sin, hidden, tap, use_reentrant=False
            )
            return result
        return self._forward(x, cos, sin, hidden, tap)

    def _forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor | None, tap: Tap
    ) -> Tensor:
        eps = self.config.norm_eps
        h = rms_norm(x, self.attn_norm, eps)
        tap("attn_norm", h)
        h = F.linear(self._attention(h, cos, sin, hidden, tap), self.wo)
        x = x + drop(h, self.dropout, self.training)
        tap("attn_out", x)
        h = rms_norm(x, self.ffn_norm, eps)
        tap("ffn_norm", h)
        h = F.silu(F.linear(h, self.w_gate)) * F.linear(h, self.w_up)
        tap("ffn_hidden", h)
        h = F.linear(h, self.w_down)
        x = x + drop(h, self.dropout, self.training)
        tap("ffn_out", x)
        return x

    def _attention(
        self, h: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor | None, tap: Tap
    ) -> Tensor:
        config = self.config
        batch, n_tokens, _ = h.shape
        heads = (batch, n_tokens, -1, config.head_dim)
        q = rotate(F.linear(h, self.wq).view(heads), cos, sin)
        k = rotate(F.linear(h, self.wk).view(heads), cos, sin)
        v = F.linear(h, self.wv).view(heads)
        tap("q", q.flatten(2))
        tap("k", k.flatten(2))
        tap("v", v.flatten(2))
        group = config.n_heads // config.n_kv_heads  # query heads that share a key head
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))
        mixed = mix_heads(q, k, v, hidden)
        mixed = mixed.transpose(1, 2).reshape(batch, n_tokens, -1)
        tap("attn", mixed)
        return mixed


class Llama(nn.Module):
    """A Llama for training. Its state_dict has the names and shapes of ``Config.tensor_shapes()``.

    ``dropout`` acts on the embedding and on both branches that are added to the residual stream,
    in training mode only; see :func:`drop`. With ``recompute`` only the input of each layer is
    kept, and the layer computed again for its gradients (Chen et al., arXiv 1604.06174). With
    ``bos_id`` no token sees one before the last ``bos_id`` at or before itself: what is packed into
    a window together stays apart (as in Llama 3, arXiv 2407.21783, section 3.2). Weights start
    normal with deviation 0.02, those that write to the residual stream divided by
    sqrt(2 n_layers) (GPT-2, llama2.c).
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: Config,
        dropout: float = 0.0,
        recompute: bool = False,
        bos_id: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.bos_id = bos_id
        self.tok_embed = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.layers = nn.ModuleList(
            Layer(config, dropout, recompute) for _ in range(config.n_layers)
        )
        self.final_norm = nn.Parameter(torch.ones(config.dim))
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        cos, sin = rope_tables(config, config.max_seq_len)
        self.register_buffer("cos", torch.from_numpy(cos), persistent=False)
        self.register_buffer("sin", torch.from_numpy(sin), persistent=False)
        residual = 0.02 / math.sqrt(2 * config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(
                    parameter, std=residual if name.endswith(("wo", "w_down")) else 0.02
                )

    def forward(self, tokens: Tensor, tap: Tap | None = None) -> Tensor:
        """``tokens`` int64 (batch, n_tokens) -> logits (batch, n_tokens, vocab_size).

        ``tap(stage, value)`` is called at every named stage; see :func:`trace`.
        Raises ArgumentError when the tokens do not fit into ``max_seq_len``.
        """
        n_tokens = tokens.shape[1]
        if n_tokens > self.config.max_seq_len:
            raise ArgumentError(
                f"{n_tokens} tokens do not fit into max_seq_len {self.config.max_seq_len}"
            )
        tap = tap or _ignore
        cos, sin = self.cos[:n_tokens], self.sin[:n_tokens]
        x = F.embedding(tokens, self.tok_embed)
        tap("tok_embed", x)
        x = drop(x, self.dropout, self.training)
        hidden = None
        if self.bos_id is not None:
            document = (tokens == self.bos_id).cumsum(1)
            apart = document[:, None, :, None] != document[:, None, None, :]
            hidden = apart | future(n_tokens, tokens.device)
        for i, layer in enumerate(self.layers):
            x = layer(
                x, cos, sin, hidden, lambda stage, value, i=i: tap(f"layers.{i}.{stage}", value)
            )
        x = rms_norm(x, self.final_norm, self.config.norm_eps)
        tap("final_norm", x)
        logits = F.linear(x, self.tok_embed if self.lm_head is None else self.lm_head)
        tap("logits", logits)
        return logits


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, in float32 (Zhang and Sennrich, arXiv 1910.07467)."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def drop(x: Tensor, dropout: float, training: bool) -> Tensor:
    """Dropout (Srivastava et al. 2014) of a share rounded to 256ths, 1/256 at least.

    A random byte decides for each number, eight from one draw: on a CPU, a draw per number, as in
    torch's own, would cost more than the rest of the layer. For the same reason the weights of
    attention, far more numbers than the stream has, are left alone.
    """
    if not training or dropout == 0.0:
        return x
    lost = max(1, round(dropout * 256))
    draws = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 7) // 8,), device=x.device)
    kept = draws.view(torch.uint8)[: x.numel()].view(x.shape) >= lost
    return torch.where(kept, x * (256 / (256 - lost)), 0.0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) of a head by its position's angle.

    ``x`` (batch, n_tokens, heads, head_dim); ``cos``, ``sin`` (n_tokens, head_dim / 2).
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def mix_heads(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Softmax attention over (batch, heads, n_tokens, head_dim).

    ``hidden``: bool, (batch, 1, n_tokens, n_tokens), what a token (row) does not see; None: what
    comes after it. On a CPU, plain matrix products train faster than the fused kernel at these
    small sizes; elsewhere the fused kernel saves the memory of the scores.
    """
    if q.device.type != "cpu":
        if hidden is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden)
    if hidden is None:
        hidden = future(q.shape[2], q.device)
    scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[3])
    return scores.masked_fill(hidden, -math.inf).softmax(-1).to(v.dtype) @ v


def future(n_tokens: int, device: torch.device) -> Tensor:
    """What a token does not see where all before it counts: bool (n_tokens, n_tokens)."""
    return torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).triu(1)


def _ignore(stage: str, value: Tensor) -> None:
    pass


def trace(model: Llama, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Every stage of one forward pass over ``tokens`` (n_tokens,).

    Returns name -> float32 (n_tokens, width), in order: ``tok_embed``; for each layer i, under
    ``layers.{i}.``: ``attn_norm``, ``q`` and ``k`` (after rope), ``v``, ``attn`` (heads mixed,
    before wo), ``attn_out`` (the stream after adding it), ``ffn_norm``, ``ffn_hidden``
    (silu(gate) · up), ``ffn_out`` (the stream again); ``final_norm``; ``logits``. The NumPy
    reference and the native core use the same names.
    """
    stages: dict[str, np.ndarray] = {}

    def tap(stage: str, value: Tensor) -> None:
        stages[stage] = value[0].float().cpu().numpy().copy()

    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(torch.as_tensor(np.asarray(tokens, np.int64))[None].to(model.cos.device), tap)
    model.train(was_training)
    return stages


def state_to_tensors(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A state_dict in main memory -> the tensors of a Checkpoint: float32 arrays of the same names,
    which share that memory."""
    return {name: value.detach().float().numpy() for name, value in state.items()}


def tensors_to_state(
    tensors: Mapping[str, np.ndarray], config: Config, source: str = "checkpoint"
) -> dict[str, Tensor]:
    """The tensors of a Checkpoint -> a state_dict. Raises FormatError when they do not fit."""
    state: dict[str, Tensor] = {}
    for name, shape in config.tensor_shapes().items():
        if name not in tensors or tensors[name].shape != shape:
            found = tensors[name].shape if name in tensors else "missing"
            raise FormatError(f"{source}: tensor {name} is {found}, the model needs {shape}")
        state[name] = torch.from_numpy(np.array(tensors[name], np.float32))
    return state
