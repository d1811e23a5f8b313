"""The methods of nano-vLLM that are replaced."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ...pages import NULL_PAGE
from .layout import Modules, names_of
from .rotation import take_over
from .rows import Decode, prefill_batch
from .serving import Serving

OF_TEMPERATURES = {"temperature", "torch", "tensor", "float32", "cuda"}  # a `prepare_sample` of these sends no more


def replacements(nano: Modules) -> list[tuple[type, str, Callable]]:
    """Class, name and new function of each; the originals are called by some of them.

    In the order of an engine's life: it warms up, sizes its cache beside what that holds, captures, steps, and ends.
    """
    kind, blocks, attention = nano.runner.ModelRunner, nano.blocks.BlockManager, nano.attention.Attention
    warm_up, allocate, leave, make_blocks = kind.warmup_model, kind.allocate_kv_cache, kind.exit, blocks.__init__
    engine, make = nano.engine.LLMEngine, nano.engine.LLMEngine.__init__
    run_rows, send_sampling = kind.run, vars(kind).get("prepare_sample")

    def warmup_model(self) -> None:
        """Captures over two pages, then warms up; what that took is held while nano-vLLM sizes its cache."""
        config, hf_config = self.config, self.config.hf_config
        with torch.device("cpu"):  # the default of every later step; here it is CUDA
            take_over(self.model, attention, hf_config)
        serving = self.graphattn = Serving(
            self.model,
            [module for module in self.model.modules() if isinstance(module, attention)],
            page_size=self.block_size,
            max_batch=config.max_num_seqs,
            max_seq_len=hf_config.max_position_embeddings,
            max_prefill_tokens=config.max_num_batched_tokens,
            enforce_eager=self.enforce_eager,
            is_alone=getattr(self, "world_size", 1) == 1,
        )
        if isinstance(sampler := getattr(self, "sampler", None), torch.nn.Module):
            sampler.register_forward_hook(lambda module, inputs, token_ids: serving.sampled(token_ids))
        with torch.device("cpu"):
            serving.lay_out_smallest()
            with torch.inference_mode():
                serving.runner.capture(max_buckets=1 if self.enforce_eager else None)
            warm_up(self)

    def allocate_kv_cache(self) -> None:
        """Has nano-vLLM size and allocate its cache, which takes the place of the two pages."""
        allocate(self)
        with torch.device("cpu"):
            self.graphattn.lay_out(list(zip(*self.kv_cache, strict=True)))

    def capture_cudagraph(self) -> None:
        """Captures every bucket."""
        self.graphs = self.graph_pool = None  # exit() deletes them
        with torch.device("cpu"), torch.inference_mode():
            self.graphattn.runner.capture()

    def prepare_prefill(self, seqs: list) -> tuple:
        """What `run_model` takes: the batch, and nothing besides; the language model's head reads the context."""
        device = next(self.model.parameters()).device
        batch = prefill_batch(seqs, page_size=self.block_size, device=device)
        ends = batch.qo_indptr_B1.pin_memory() if device.type == "cuda" else batch.qo_indptr_B1
        nano.context.set_context(True, cu_seqlens_q=ends.to(device, non_blocking=True))
        return batch, None

    def prepare_decode(self, seqs: list) -> tuple:
        """What `run_model` takes: the rows, and nothing besides."""
        nano.context.set_context(False)
        return Decode.of(seqs, self.graphattn.drawn), None

    def run(self, seqs: list, is_prefill: bool) -> list[int] | None:
        """Runs the rows, and notes where on the device lies what was drawn for them."""
        token_ids = run_rows(self, seqs, is_prefill)
        self.graphattn.drawn.end(seqs, token_ids)
        return token_ids

    def prepare_sample(self, seqs: list) -> Tensor:
        """Temperatures on the device, sent if they are not those of the step before."""
        asked = [seq.temperature for seq in seqs]
        if self.graphattn.temperatures is None or self.graphattn.temperatures[0] != asked:
            self.graphattn.temperatures = (asked, send_sampling(self, seqs))
        return self.graphattn.temperatures[1]

    @torch.inference_mode()
    def run_model(self, input_ids, positions: None, is_prefill: bool) -> Tensor | None:
        """Logits of each row's last token, `[rows, vocab]`; None for ranks other than the first."""
        hidden = self.graphattn.prefill(input_ids) if is_prefill else self.graphattn.decode(input_ids)
        return self.model.compute_logits(hidden)

    def exit(self) -> None:
        """Frees graphs and buffers, then ends as nano-vLLM does."""
        self.graphattn.close()
        leave(self)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends and attends, and norms and rotates before that where it was taken over.

        q is `[N, heads, head_dim]`, k and v are `[N, kv_heads, head_dim]`.
        """
        if (rotary := self.rotary) is None:
            return torch.ops.graphattn.attend(q, k, v, self.k_page, self.v_page, 0)
        norms = (rotary.q_weight, rotary.k_weight, rotary.eps)
        return torch.ops.graphattn.rotary_attend(q, k, v, self.k_page, self.v_page, 0, rotary.inv_freq, 1.0, *norms, 0)

    def make_engine(self, *arguments, **options) -> None:
        """Has its rank know its scheduler, and draws for prompts of a token.

        So no request waits for compilation: nano-vLLM's compiled functions have a graph for a single row, one for the
        first other number of rows and one for any, and new ones for another default dtype or device, such as while its
        runner is made. What is random goes on as it would have.
        """
        make(self, *arguments, **options)
        runner, this = self.model_runner, weakref.ref(self)
        runner.graphattn.scheduler = lambda: getattr(this(), "scheduler", None)
        device = next(runner.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for count in range(1, min(3, runner.config.max_num_seqs) + 1):
                seqs = [nano.sequence.Sequence([0]) for _ in range(count)]
                for seq in seqs:
                    seq.num_scheduled_tokens = 1
                runner.call("run", seqs, True)

    def reserve(self, num_blocks: int, block_size: int) -> None:
        """Block 0 is never given out: padding rows write to it."""
        make_blocks(self, num_blocks, block_size)
        self.free_block_ids.remove(NULL_PAGE)

    steps = (warmup_model, allocate_kv_cache, capture_cudagraph, prepare_prefill, prepare_decode, run_model, run, exit)
    code = getattr(send_sampling, "__code__", None)
    if code and code.co_varnames[: code.co_argcount] == ("self", "seqs") and {*names_of(code)} <= OF_TEMPERATURES:
        steps += (prepare_sample,)
    replaced = [(kind, function.__name__, function) for function in steps]
    replaced += [(attention, "forward", forward), (blocks, "__init__", reserve)]
    return [*replaced, (engine, "__init__", make_engine)]
