import torch
import distclip
from tests.harness import on_ranks
import torch.distributed as dist


def test_single():
    m = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 3))
    m(torch.randn(4, 10)).pow(2).sum().mul(10).backward()
    import copy

    g = [p.grad.clone() for p in m.parameters()]
    n = torch.nn.utils.get_total_norm(g)
    r = distclip.clip_grad_norm_(m.parameters(), 1.0)
    assert torch.allclose(n, r)
    assert abs(torch.nn.utils.get_total_norm([p.grad for p in m.parameters()]) - 1) < 1e-4


@on_ranks(2)
def test_fsdp2(rank):
    from torch.distributed.fsdp import fully_shard

    m = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 3))
    for l in m:
        fully_shard(l)
    fully_shard(m)
    torch.manual_seed(rank)
    m(torch.randn(4, 10)).pow(2).sum().mul(10).backward()
    n = torch.nn.utils.get_total_norm([p.grad for p in m.parameters()]).full_tensor()
    c = distclip.Clipper(m, distclip.GlobalNorm(1.0))
    r = c.clip()
    assert torch.allclose(n, r.total_norm)
    assert abs(torch.nn.utils.get_total_norm([p.grad for p in m.parameters()]).full_tensor() - 1) < 1e-4
    print(r)
    return str(r)
