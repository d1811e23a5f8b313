"""The least engine that has nano-vLLM's interfaces: names, arguments and who calls whom; nothing of its code.

It serves a model of embeddings and attention layers, at temperature 0, and shares full blocks of prompts. `modules()`
are to be put into `sys.modules`; `flash_attn` must be there.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

BLOCK = 256


@dataclass
class Config:
    model: nn.Module
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 8
    max_model_len: int = 1024
    enforce_eager: bool = False
    num_kvcache_blocks: int = 24
    kvcache_block_size: int = BLOCK
    tensor_parallel_size: int = 1
    max_position_embeddings: int = 1024

    @property
    def hf_config(self):
        return SimpleNamespace(max_position_embeddings=self.max_position_embeddings)


@dataclass
class Context:
    is_prefill: bool = False
    cu_seqlens_q: torch.Tensor | None = None
    rows: tuple = ()  # starts and ends of the rows in their sequences, and their blocks


class Now:
    context = Context()


def set_context(is_prefill, cu_seqlens_q=None, rows=()):
    Now.context = Context(is_prefill, cu_seqlens_q, rows)


def reset_context():
    Now.context = Context()


class Attention(nn.Module):
    def __init__(self, num_heads, head_dim, scale, num_kv_heads):
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.num_kv_heads = num_heads, head_dim, scale, num_kv_heads
        self.k_cache = self.v_cache = torch.tensor([])

    def forward(self, q, k, v):
        attend, at, outs = sys.modules["flash_attn"].attend, 0, []
        for start, end, blocks in Now.context.rows:
            keys, values = (cache.flatten(0, 1) if blocks else None for cache in (self.k_cache, self.v_cache))
            new = slice(at, at := at + end - start)
            slots = [blocks[place // BLOCK] * BLOCK + place % BLOCK for place in range(end)] if blocks else None
            if blocks:
                keys[slots[start:]], values[slots[start:]] = k[new], v[new]
                outs.append(attend(q[new], keys[slots], values[slots], self.scale))
            else:
                outs.append(attend(q[new], k[new], v[new], self.scale))
        return torch.cat(outs)


class Model(nn.Module):
    """Embeddings of tokens and places, two attention layers, and logits by the embeddings; random weights."""

    def __init__(self, vocab=64, width=32, heads=4, kv_heads=2, layers=2, places=1024):
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(places, width)
        self.mix = nn.ModuleList(nn.Linear(width, (heads + 2 * kv_heads) * self.dim) for _ in range(layers))
        attention = sys.modules["nanovllm.layers.attention"].Attention
        self.attn = nn.ModuleList(attention(heads, self.dim, self.dim**-0.5, kv_heads) for _ in range(layers))

    def forward(self, input_ids, positions):
        x = self.tokens(input_ids) + self.places(positions)
        for mix, attn in zip(self.mix, self.attn, strict=True):
            q, k, v = mix(x).unflatten(-1, (-1, self.dim)).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            x = x + 3 * attn(q, k, v).flatten(1)
        return x

    def compute_logits(self, hidden):
        if Now.context.is_prefill:
            hidden = hidden[Now.context.cu_seqlens_q[1:].long() - 1]
        return hidden @ self.tokens.weight.T


class Sequence:
    def __init__(self, token_ids, sampling_params=None):
        self.token_ids, self.last_token, self.block_table = list(token_ids), token_ids[-1], []
        self.num_cached_tokens = self.num_scheduled_tokens = 0
        self.num_prompt_tokens, self.max_tokens = len(token_ids), sampling_params or 1

    def __len__(self):
        return len(self.token_ids)

    def __getitem__(self, key):
        return self.token_ids[key]


class BlockManager:
    """Blocks by count of their holders; a full block of a prompt is found again by all tokens up to its end."""

    def __init__(self, num_blocks, block_size):
        self.free_block_ids, self.holders = deque(range(num_blocks)), [0] * num_blocks
        self.known: dict[tuple, int] = {}

    def take(self, seq) -> bool:
        """Blocks for all tokens of a sequence, shared ones first; False if there are too few."""
        if not seq.block_table:
            for end in range(BLOCK, len(seq), BLOCK):
                block = self.known.get(tuple(seq[:end]))
                if block is None or not self.holders[block]:
                    break
                self.holders[block] += 1
                seq.block_table.append(block)
            seq.num_cached_tokens = len(seq.block_table) * BLOCK
        while len(seq.block_table) * BLOCK < len(seq):
            if not self.free_block_ids:
                return False
            seq.block_table.append(self.free_block_ids.popleft())
            self.holders[seq.block_table[-1]] = 1
        return True

    def know(self, seq) -> None:
        for index in range(seq.num_cached_tokens // BLOCK):
            self.known[tuple(seq[: (index + 1) * BLOCK])] = seq.block_table[index]

    def release(self, seq) -> None:
        for block in seq.block_table:
            self.holders[block] -= 1
            if not self.holders[block]:
                self.free_block_ids.append(block)
        seq.block_table.clear()
        seq.num_cached_tokens = 0


class ModelRunner:
    def __init__(self, config, rank, event):
        self.config, self.rank = config, rank
        self.block_size, self.enforce_eager = config.kvcache_block_size, config.enforce_eager
        self.model = config.model
        self.warmup_model()
        self.allocate_kv_cache()
        if not self.enforce_eager:
            self.capture_cudagraph()

    def exit(self):
        if not self.enforce_eager:
            del self.graphs, self.graph_pool

    def warmup_model(self):
        seq = Sequence([0] * self.config.max_num_batched_tokens)
        seq.num_scheduled_tokens = len(seq)
        self.run([seq], True)

    def allocate_kv_cache(self):
        shape = (self.config.num_kvcache_blocks, self.block_size, self.model.kv_heads, self.model.dim)
        self.kv_cache = torch.full((2, len(self.model.attn), *shape), float("nan"))
        for index, attn in enumerate(self.model.attn):
            attn.k_cache, attn.v_cache = self.kv_cache[0, index], self.kv_cache[1, index]

    def capture_cudagraph(self):
        self.graph_bs, self.graphs, self.graph_pool = [1], {}, None

    def prepare_prefill(self, seqs):
        rows = [(s.num_cached_tokens, s.num_cached_tokens + s.num_scheduled_tokens, s.block_table) for s in seqs]
        return self._inputs(True, rows, [seq[start:end] for seq, (start, end, _) in zip(seqs, rows, strict=True)])

    def prepare_decode(self, seqs):
        rows = [(len(seq) - 1, len(seq), seq.block_table) for seq in seqs]
        return self._inputs(False, rows, [[seq.last_token] for seq in seqs])

    def _inputs(self, is_prefill, rows, tokens):
        ends = torch.tensor([0, *(end - start for start, end, _ in rows)]).cumsum(0)
        set_context(is_prefill, ends, tuple(rows))
        places = [place for start, end, _ in rows for place in range(start, end)]
        return torch.tensor(sum(tokens, [])), torch.tensor(places)

    @torch.inference_mode()
    def run_model(self, input_ids, positions, is_prefill):
        return self.model.compute_logits(self.model(input_ids, positions))

    def call(self, method_name, *args):
        return getattr(self, method_name)(*args)

    def run(self, seqs, is_prefill):
        input_ids, positions = self.prepare_prefill(seqs) if is_prefill else self.prepare_decode(seqs)
        logits = self.run_model(input_ids, positions, is_prefill)
        reset_context()
        return logits.argmax(-1).tolist()


class LLMEngine:
    def __init__(self, model, **kwargs):
        self.config = Config(model, **kwargs)
        self.model_runner = sys.modules["nanovllm.engine.llm_engine"].ModelRunner(self.config, 0, [])
        self.blocks = BlockManager(self.config.num_kvcache_blocks, self.config.kvcache_block_size)
        self.waiting, self.running = deque(), []
        self.num_preempted = 0

    def exit(self):
        self.model_runner.call("exit")
        del self.model_runner

    def schedule(self):
        scheduled, budget = [], self.config.max_num_batched_tokens
        while self.waiting and budget and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.blocks.take(seq):
                self.blocks.release(seq)
                break
            seq.num_scheduled_tokens = min(budget, len(seq) - seq.num_cached_tokens)
            budget -= seq.num_scheduled_tokens
            scheduled.append(seq)
            if seq.num_cached_tokens + seq.num_scheduled_tokens == len(seq):
                self.running.append(self.waiting.popleft())
        if scheduled:
            return scheduled, True
        for seq in list(self.running):
            while seq in self.running and not self.blocks.take(seq):
                last = self.running.pop()
                self.blocks.release(last)
                self.waiting.appendleft(last)
                self.num_preempted += 1
            seq.num_scheduled_tokens = 1
        return list(self.running), False

    def generate(self, prompts, counts):
        """Tokens that follow each prompt, `counts[i]` of them."""
        seqs = [Sequence(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
        self.waiting += seqs
        while self.waiting or self.running:
            rows, is_prefill = self.schedule()
            for seq, token_id in zip(rows, self.model_runner.call("run", rows, is_prefill), strict=True):
                seq.num_cached_tokens += seq.num_scheduled_tokens
                self.blocks.know(seq)
                if seq.num_cached_tokens < len(seq):
                    continue
                seq.token_ids.append(token_id)
                seq.last_token = token_id
                if len(seq) - seq.num_prompt_tokens == seq.max_tokens:
                    self.running.remove(seq)
                    self.blocks.release(seq)
        return [seq[seq.num_prompt_tokens :] for seq in seqs]


def modules() -> dict[str, ModuleType]:
    """nano-vLLM's modules by name, each with what is found in it there."""
    homes = {
        "": {"LLM": LLMEngine},
        ".engine": {},
        ".engine.llm_engine": {"LLMEngine": LLMEngine, "ModelRunner": ModelRunner},
        ".engine.model_runner": {"ModelRunner": ModelRunner},
        ".engine.block_manager": {"BlockManager": BlockManager},
        ".engine.sequence": {"Sequence": Sequence},
        ".layers": {},
        ".layers.attention": {"Attention": Attention},
        ".utils": {},
        ".utils.context": {"set_context": set_context, "reset_context": reset_context},
    }
    made = {}
    for home, names in homes.items():
        made[f"nanovllm{home}"] = ModuleType(f"nanovllm{home}")
        vars(made[f"nanovllm{home}"]).update(names, __path__=[])
    return made
