"""
Muon, the optimiser of both stages (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

The gradient of a weight matrix mostly has a few large singular values, so that a step changes the
matrix in a few directions alone. Muon sets all singular values to 1: the other directions, in which
rare sounds and motions are learnt, move as fast. It is for the matrices of hidden layers; Adam is
for all that is no matrix and for the layers that read or write motion, codes and phones.

torch.optim.Muon does the same, but not for convolutions, and in bfloat16, which takes twenty times
as long on a processor that does not know that type (measured).
"""
import torch


def orthogonalise(matrices):
    """U S V^T -> about U V^T: all singular values near 1. (matrices, rows, columns), float32

    The Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X changes singular values
    alone, each by s <- a s + b s^3 + c s^5. With Jordan's a, b and c, three steps bring those above
    0.02 between 0.68 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if is_wide else matrices.mT                # so that X X^T is small
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)     # no singular value is above 1
    for _ in range(3):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)     # b S + c S S
        x = torch.baddbmm(x, polynomial, x, beta=a)                             # a X + polynomial X
    return x if is_wide else x.mT


def stack(tensors):
    """Matrices of one shape, (matrices, rows, columns); a convolution is (D_out, D_in * kernel)."""
    return torch.stack([tensor.detach().flatten(1) for tensor in tensors])


class Muon(torch.optim.Adam):
    """Matrices of the hidden layers in `modules` learn with Muon, other `parameters` with Adam.

    lr is for both. ValueError for the state of another optimiser.
    """

    def __init__(self, parameters, modules, lr):
        by_shape = {}                       # matrices of one shape are orthogonalised at once
        hidden = set()
        for module in modules:
            for p in module.parameters():
                if p.ndim >= 2:
                    by_shape.setdefault(p.flatten(1).shape, []).append(p)
                    hidden.add(p)
        self.groups = list(by_shape.values())
        self.momenta = [torch.zeros_like(stack(matrices)) for matrices in self.groups]
        super().__init__([p for p in parameters if p not in hidden], lr=lr, fused=True)

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for matrices in self.groups:
            for p in matrices:
                p.grad = None

    @torch.no_grad()
    def step(self):
        super().step()
        lr = self.param_groups[0]["lr"]
        for matrices, momentum in zip(self.groups, self.momenta):
            # a layer that is not in use has no gradient; it stays as it is
            grad = stack([torch.zeros_like(p) if p.grad is None else p.grad for p in matrices])
            momentum.mul_(0.95).add_(grad)
            update = orthogonalise(grad + 0.95 * momentum)  # Nesterov's momentum
            # as large as Adam's updates, so that one learning rate is for both (Liu et al. 2025)
            update *= lr * 0.2 * max(update.shape[1:]) ** 0.5
            for p, change in zip(matrices, update):
                p.sub_(change.view_as(p))

    def state_dict(self):
        return super().state_dict() | {"momenta": self.momenta}

    def load_state_dict(self, state):
        if "momenta" not in state:
            raise ValueError("--resume: a run of this version expected, found one that learnt with "
                             "Adam; start anew without --resume")
        super().load_state_dict(state)
        for momentum, saved in zip(self.momenta, state["momenta"]):
            momentum.copy_(saved)
