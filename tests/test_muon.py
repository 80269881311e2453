"""
Muon against the singular value decomposition, and what it does with each kind of parameter.
"""
import pytest
import torch

from support.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(32, 32), (32, 80), (80, 32)])
def test_orthogonalise_changes_singular_values_alone(shape):
    torch.manual_seed(0)
    rank = min(shape)
    u, _ = torch.linalg.qr(torch.randn(shape[0], rank))
    v, _ = torch.linalg.qr(torch.randn(shape[1], rank))
    sigma = torch.logspace(0, -1, rank)                     # the smallest is a tenth of the largest
    result = u.t() @ orthogonalise(7 * (u * sigma) @ v.t()[None])[0] @ v
    assert (result - result.diag().diag()).abs().max() < 1e-4
    assert 0.67 < result.diag().min() and result.diag().max() < 1.21


def make_layers():
    torch.manual_seed(0)
    hidden = torch.nn.Sequential(torch.nn.Conv1d(4, 16, 3), torch.nn.GELU(), torch.nn.Linear(6, 9))
    return hidden, torch.nn.Linear(9, 5)


def train(hidden, head, optimiser, steps):
    for step in range(steps):
        x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        head(hidden(x)).square().mean().backward()
        optimiser.step()


def test_steps_of_hidden_matrices_are_orthogonal_and_the_others_are_adams():
    hidden, head = make_layers()
    names = [name for name, _ in hidden.named_parameters()]
    before = [p.detach().clone() for p in hidden.parameters()]
    optimiser = Muon([*hidden.parameters(), *head.parameters()], [hidden], lr=0.01)
    train(hidden, head, optimiser, 1)
    for name, p, old in zip(names, hidden.parameters(), before):
        change = (p - old).flatten(1) if p.ndim > 1 else p - old
        if p.ndim > 1:                      # a step of about lr * 0.2 * sqrt(D) in every direction
            sigma = torch.linalg.svdvals(change) / (0.01 * 0.2 * max(change.shape) ** 0.5)
            assert 0.3 < sigma[:3].min() and sigma.max() < 1.21, name
        else:                               # Adam's first step: lr, whatever the gradient's size
            assert change.abs().allclose(torch.tensor(0.01), rtol=1e-2), name


def test_state_dict_continues_to_the_bit():
    once, twice = make_layers(), make_layers()
    optimiser = Muon([p for m in once for p in m.parameters()], [once[0]], lr=0.01)
    train(*once, optimiser, 3)
    first = Muon([p for m in twice for p in m.parameters()], [twice[0]], lr=0.01)
    train(*twice, first, 3)
    second = Muon([p for m in twice for p in m.parameters()], [twice[0]], lr=0.5)
    second.load_state_dict(first.state_dict())
    train(*once, optimiser, 2)
    train(*twice, second, 2)
    for p, q in zip(once[0].parameters(), twice[0].parameters()):
        assert torch.equal(p, q)
    assert second.param_groups[0]["lr"] == 0.01


def test_layers_without_a_gradient_stay():
    hidden, head = make_layers()
    unused = torch.nn.Linear(9, 9)
    weight = unused.weight.detach().clone()
    optimiser = Muon([*hidden.parameters(), *unused.parameters()], [hidden, unused], lr=0.01)
    train(hidden, head, optimiser, 2)
    assert torch.equal(unused.weight, weight)


def test_state_of_an_earlier_version_is_refused():
    hidden, head = make_layers()
    optimiser = Muon([*hidden.parameters(), *head.parameters()], [hidden], lr=0.01)
    with pytest.raises(ValueError, match="start anew without --resume"):
        optimiser.load_state_dict(torch.optim.Adam(head.parameters()).state_dict())
