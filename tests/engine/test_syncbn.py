"""A head with SyncBN where one process has no RoI neither hangs nor goes NaN."""

import torch
import torch.distributed as dist
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.utils import comm


def _step(rank, rendezvous, rois, report):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    torch.manual_seed(0)
    head = MaskRCNNConvUpsampleHead(
        ShapeSpec(channels=8), num_classes=2, conv_dims=[8, 8, 8], conv_norm="naiveSyncBN_N"
    )
    features = torch.randn(rois[rank], 8, 14, 14)
    head.layers(features).sum().backward()
    finite = all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    finite &= all(b.isfinite().all() for b in head.buffers())
    report.put((rank, bool(finite)))
    dist.barrier()
    dist.destroy_process_group()


def test_no_rois_on_one_process(tmp_path):
    for name, rois in (("some", (3, 2)), ("none", (3, 0))):
        context = torch.multiprocessing.get_context("spawn")
        report = context.SimpleQueue()
        torch.multiprocessing.spawn(_step, (str(tmp_path / name), rois, report), nprocs=2)
        assert sorted(report.get() for _ in rois) == [(0, True), (1, True)], name
