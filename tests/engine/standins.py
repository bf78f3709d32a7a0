"""A tiny detector and tiny data with the interfaces of the real ones, for tests of the engine."""

import torch
from torch import Tensor, nn

from fastrcnn.config import Config
from fastrcnn.engine import inference, trainer
from fastrcnn.structures import BoxList, DetectionBatch, ImageBatch, TargetBatch

SIDE = 16


def tiny_config(folder, **solver) -> Config:
    cfg = Config()
    cfg.OUTPUT_DIR = str(folder)
    cfg.MODEL.DEVICE = "cpu"
    cfg.SEED = 3
    cfg.DATASETS.TEST = ("tiny",)
    cfg.SOLVER.MAX_ITER = 8
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.BASE_LR = 0.05
    cfg.SOLVER.WARMUP_ITERS = 3
    cfg.SOLVER.STEPS = (6,)
    cfg.SOLVER.LOG_PERIOD = 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    for key, value in solver.items():
        setattr(cfg.SOLVER, key, value)
    return cfg


class TinyDetector(nn.Module):
    """Losses with (`noise`) and without random numbers; detects one box per image whose place depends on the pixels."""

    def __init__(self, noise: float = 0.1):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.noise = noise

    def forward(self, images: ImageBatch, targets: TargetBatch | None = None) -> dict[str, Tensor] | DetectionBatch:
        features = self.conv(images.pixels).relu().mean((2, 3))  # [B, 4]
        boxes = self.head(features)
        if self.training:
            wanted = targets.boxes[:, 0] / SIDE + self.noise * torch.randn(len(boxes), 4)
            return {"loss_box": (boxes - wanted).square().mean(), "loss_small": 0.01 * features.square().mean()}
        corner = images.pixels.mean((1, 2, 3)).abs().clamp(0, 1)[:, None] * 4
        count = len(boxes)
        return DetectionBatch(
            boxes=torch.cat([corner, corner, corner + 8, corner + 8], 1)[:, None],
            scores=torch.full((count, 1), 0.9),
            labels=torch.ones(count, 1, dtype=torch.int64),
            count=torch.ones(count, dtype=torch.int32),
            sizes=images.sizes,
            original_sizes=images.original_sizes,
        )


class TinyDataset:
    def __init__(self, count: int = 6):
        self.categories = {1: "thing"}
        self.pixels = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.pixels)

    def get_img_info(self, index: int) -> dict[str, int]:
        return {"height": SIDE, "width": SIDE}

    def __getitem__(self, index: int):
        target = BoxList(torch.tensor([[1.0, 1, 9, 9]]) + index % 3, (SIDE, SIDE))
        target.add_field("labels", torch.ones(1, dtype=torch.int64))
        return self.pixels[index], target, index


def collate(dataset: TinyDataset, ids: list[int]) -> tuple[ImageBatch, TargetBatch, list[int]]:
    sizes = torch.full((len(ids), 2), SIDE, dtype=torch.int32)
    batch = ImageBatch(torch.stack([dataset[i][0] for i in ids]), sizes, sizes)
    return batch, TargetBatch.from_boxlists([dataset[i][1] for i in ids], batch), ids


class TrainLoader:
    """The order depends on the iteration alone; a rank gets its slice of the global batch."""

    def __init__(self, cfg: Config, start: int, rank: int, world_size: int):
        self.cfg, self.start, self.rank, self.world_size = cfg, start, rank, world_size
        self.dataset = TinyDataset()

    def __len__(self) -> int:
        return self.cfg.SOLVER.MAX_ITER - self.start

    def __iter__(self):
        size = self.cfg.SOLVER.IMS_PER_BATCH
        for iteration in range(self.start, self.cfg.SOLVER.MAX_ITER):
            order = torch.randint(6, (size,), generator=torch.Generator().manual_seed(iteration)).tolist()
            yield collate(self.dataset, order[self.rank * size // self.world_size :][: size // self.world_size])


class TestLoader:
    __test__ = False
    dataset_name = "tiny"

    def __init__(self, rank: int, world_size: int):
        self.dataset = TinyDataset()
        self.ids = list(range(6))[rank::world_size]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self):
        for index in self.ids:
            images, _, ids = collate(self.dataset, [index])
            yield images, ids


def make_data_loader(cfg: Config, is_train: bool, start_iter: int = 0, rank: int = 0, world_size: int = 1):
    return TrainLoader(cfg, start_iter, rank, world_size) if is_train else [TestLoader(rank, world_size)]


def use_standins(noise: float = 0.1) -> None:
    """Puts the tiny detector and its data where `train` and `test` look for the real ones."""
    for module in (inference, trainer):
        module.build_model = lambda cfg: TinyDetector(noise)
        module.make_data_loader = make_data_loader
