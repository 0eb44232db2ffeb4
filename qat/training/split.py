"""A causal language model in two steps, so that logits need not exist for all tokens at once."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qat.nn.windows import whole_windows

PROBE = 4  # tokens
FIX = "training needs a model whose forward is its base_model and, on what that returns, its head"


class SplitModel:
    """Token ids -> hidden states -> logits.

    The second step is the model's own forward with the given hidden states in the place of its decoder. So whatever a
    family does there, soft-capping or scaling of logits included, is done, and every module that it calls is the
    model's own: trained, frozen, tied or quantized.

    Args:
        model: A Hugging Face causal language model. It is neither changed nor copied.
        compiled: Whether the decoder's blocks run through `torch.compile`: one compilation serves all of them.

    Raises:
        ValueError: The model's logits are not a function of its decoder's output, or its forward does not call
            `base_model`. That is tried on a few tokens; the class of the model is named.
    """

    def __init__(self, model: PreTrainedModel, compiled: bool = False):
        decoder = model.base_model
        refused = f"{type(model).__name__}: its logits do not follow from the output of its decoder"
        if decoder is model:
            raise ValueError(f"{refused}: it has none apart (base_model_prefix={model.base_model_prefix!r}); {FIX}")
        self.model = model
        self.compiled = compiled_blocks(decoder) if compiled else {}
        self.windows = True  # whether its attention can do without a mask (`nn/windows.py`); some families cannot
        self._given = _Given()
        self._rest = copy.copy(model)  # shallow: modules and parameters are the model's
        self._rest._modules = {n: self._given if m is decoder else m for n, m in model._modules.items()}
        mode = model.training
        try:
            self.vocabulary = self._compare(model.eval(), refused)
        finally:
            model.train(mode)

    def hidden(self, ids: Tensor, eager: bool = False) -> Tensor:
        """The decoder's output, `[B, T]` -> `[B, T, H]`; `eager`: in no case compiled, so that hooks are called."""
        blocks = {} if eager else self.compiled
        try:
            for block, call in blocks.items():
                block._compiled_call_impl = call
            with whole_windows(self.model) if self.windows else nullcontext():
                return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for block in blocks:
                block._compiled_call_impl = None

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits for the decoder's output: `[B, T, H]` -> `[B, T, V]`."""
        self._rest.training = self.model.training
        return self._rest(inputs_embeds=hidden, use_cache=False).logits

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the second step, such as an untied head's weight."""
        return [parameter for parameter in self._rest.parameters() if parameter.requires_grad]

    @property
    def sizes(self) -> dict[str, int]:
        """Entries of the vocabulary wherever it has a size; padding makes them differ from each other."""
        return {
            "config.vocab_size": self.model.config.get_text_config().vocab_size,
            "embeddings": len(self.model.get_input_embeddings().weight),
            "logits": self.vocabulary,
        }

    @torch.no_grad()
    def _compare(self, model: PreTrainedModel, refused: str) -> int:
        device = next(model.parameters()).device
        ids = torch.arange(PROBE, device=device)[None]
        expected = model(input_ids=ids, use_cache=False).logits
        output = model.base_model(input_ids=ids, use_cache=False)
        self._given.kind = type(output)
        try:
            found = self.logits(output.last_hidden_state)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{refused} alone ({error}); {FIX}") from error
        bound = 8 * torch.finfo(expected.dtype).eps * float(expected.nan_to_num(0, 0, 0).abs().max())
        if found.shape != expected.shape or not torch.allclose(found, expected, 0.0, bound, equal_nan=True):
            raise ValueError(f"{refused} alone: recomputed from it, they differ; {FIX}")
        try:
            again = self.logits(self.hidden(ids, eager=True))
            self.windows = torch.allclose(again, expected, 0.0, bound, equal_nan=True)
        except (AttributeError, TypeError, ValueError, RuntimeError):  # its modules ask for the name, or want a mask
            self.windows = False
        return expected.shape[-1]


def compiled_blocks(decoder: nn.Module, backend: str = "inductor") -> dict[nn.Module, Callable[..., Any]]:
    """Blocks and their compiled calls; the decoder as a whole where transformers marks no blocks in it."""
    blocks = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)] or [decoder]
    return {block: torch.compile(block._call_impl, backend=backend) for block in blocks}


class _Given(nn.Module):
    """Stands for a decoder that has run already: answers with the hidden states that it is handed as embeddings."""

    kind: type

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        return self.kind(last_hidden_state=inputs_embeds)
