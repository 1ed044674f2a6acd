import torch
import torch.nn.functional as F

from wmss_trl.baselines.uniform import UniformModel
from wmss_trl.losses import mixed_cross_entropy


def test_uniform_weak_model_is_the_cross_entropy_at_a_temperature(make_model):
    strong = make_model(dropout=0.0)
    weak = UniformModel(strong.config)
    input_ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    logits, weak_logits = strong(input_ids).logits, weak(input_ids=input_ids, use_cache=False).logits
    assert weak_logits.shape == logits.shape
    assert weak.get_output_embeddings().weight.shape[0] == logits.size(-1)
    targets = torch.tensor([1, 2, 3, 4, 5, 6])
    loss = mixed_cross_entropy(logits.flatten(0, 1), weak_logits.flatten(0, 1), targets, 0.4)
    torch.testing.assert_close(loss, F.cross_entropy(0.4 * logits.flatten(0, 1), targets))
