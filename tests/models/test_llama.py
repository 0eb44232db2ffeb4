import pytest
import torch
from tiny import recipe
from transformers import AutoConfig, AutoModelForCausalLM

from qat.models.families import STRUCTURES
from qat.nn.observers.minmax import MinMax
from qat.ptq.awq import awq
from qat.ptq.gptq import gptq


@pytest.mark.parametrize("family", STRUCTURES)
def test_gptq_and_awq_walk_every_family_that_claims_the_structure(family):
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.2, use_cache=False,
        sliding_window=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    batches = [torch.randint(0, 64, (2, 12))]
    for method in (gptq, awq):
        changes = method(model, recipe(), batches, observer=MinMax())
        assert len(changes.tensors) == 7
