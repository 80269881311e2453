"""
Muon, the optimiser of both stages (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

The gradient of a weight matrix mostly has a few large singular values, so that a step changes the
matrix in a few directions alone. Muon sets all singular values to 1: the other directions, in which
rare sounds and motions are learnt, move as fast. It is for the matrices of hidden layers; Adam is
for all that is no matrix and for the layers at either end.

torch.optim.Muon does the same, but not for convolutions, and in bfloat16, which takes twenty times
as long on a processor that does not know that type (measured).
"""
import torch


def orthogonalise(matrices, steps=3):
    """U S V^T -> about U V^T: all singular values near 1. (matrices, rows, columns), float32

    The Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X changes singular values
    alone, each by s <- a s + b s^3 + c s^5. With Jordan's a, b and c, three steps bring those above
    0.02 between 0.68 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if is_wide else matrices.mT                # so that X X^T is small
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)     # no singular value is above 1
    for _ in range(steps):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)     # b S + c S S
        x = torch.baddbmm(x, polynomial, x, beta=a)                             # a X + polynomial X
    return x if is_wide else x.mT


class Muon:
    """Matrices of the hidden layers in `modules` learn with Muon, other `parameters` with Adam.

    Used as an optimiser of PyTorch; lr is for both. ValueError for another optimiser's state.
    """

    def __init__(self, parameters, modules, lr):
        self.by_shape = {}                  # matrices of one shape are orthogonalised at once
        hidden = set()
        for module in modules:
            for p in module.parameters():
                if p.ndim >= 2:             # a convolution is a matrix, (D_out, D_in * kernel)
                    self.by_shape.setdefault(p.flatten(1).shape, []).append(p)
                    hidden.add(p)
        self.momenta = [torch.zeros_like(self.stack(m)) for m in self.by_shape.values()]
        others = [p for p in parameters if p not in hidden]
        self.adam = torch.optim.Adam(others, lr=lr, fused=True)
        self.param_groups = self.adam.param_groups          # the training loops set "lr" there

    def stack(self, tensors):
        return torch.stack([t.detach().flatten(1) for t in tensors])    # (matrices, rows, columns)

    def zero_grad(self, set_to_none=True):
        self.adam.zero_grad(set_to_none)
        for matrices in self.by_shape.values():
            for p in matrices:
                p.grad = None

    @torch.no_grad()
    def step(self):
        self.adam.step()
        lr = self.param_groups[0]["lr"]
        for (shape, matrices), momentum in zip(self.by_shape.items(), self.momenta):
            # a layer that is not in use has no gradient; it stays as it is
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in matrices]
            grad = self.stack(grads)
            momentum.mul_(0.95).add_(grad)
            update = orthogonalise(grad + 0.95 * momentum)  # Nesterov's momentum
            # as large as Adam's updates, so that one learning rate is for both (Liu et al. 2025)
            update *= lr * 0.2 * max(shape) ** 0.5
            for p, change in zip(matrices, update):
                p.sub_(change.view_as(p))

    def state_dict(self):
        return {"adam": self.adam.state_dict(), "momenta": self.momenta}

    def load_state_dict(self, state):
        if "momenta" not in state:
            raise ValueError("--resume: a run of this version expected, found one that learnt with "
                             "Adam; start anew without --resume")
        self.adam.load_state_dict(state["adam"])
        self.param_groups = self.adam.param_groups
        for momentum, saved in zip(self.momenta, state["momenta"]):
            momentum.copy_(saved)
