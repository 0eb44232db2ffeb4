from qat.models.families import structure_of
from qat.models.llama import LLAMA


def test_families_share_values():
    assert structure_of("qwen3") is structure_of("llama") is LLAMA
