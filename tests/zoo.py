"""Small trainings of many kinds, each as a function that builds a `Training`."""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.optim import lr_scheduler, swa_utils
from torch.utils.data import DataLoader, TensorDataset

import churn_kernels as ck

ROWS, FEATURES, CLASSES, BATCH = 32, 8, 3, 8


def data():
    torch.manual_seed(0)
    return torch.randn(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))


def mlp(*layers, width=12):
    return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), *layers, nn.Linear(width, CLASSES))


def rows_of(n):
    return (torch.arange(BATCH) + n * BATCH) % ROWS


def simple(model, make=None, *, before_step=lambda n: None, after_step=lambda n: None, state=None):
    """One model, one optimizer; what else a step does, and what that changes."""
    x, y = data()
    optimizer = (make or (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)))(model.parameters())

    def step(n):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows_of(n)]), y[rows_of(n)]).backward()
        before_step(n)
        optimizer.step()
        after_step(n)

    return ck.audit.Training(model, optimizer, step, lambda: model(x), state=state or {})


def of(make_model, make=None):
    """A training whose model is all that is special."""

    def build(device):
        torch.manual_seed(1)
        return simple(make_model(), make)

    return build


def scheduled(make):
    def build(device):
        torch.manual_seed(1)
        training = simple(mlp())
        scheduler = make(training.optimizer)
        training.model.missed = set()
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)

        def step(n):
            training.step(n)
            if n not in training.model.missed:
                scheduler.step(1.0) if plateau else scheduler.step()

        return ck.audit.Training(
            training.model, training.optimizer, step, state={"scheduler": scheduler}
        )

    return build


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.layers = kind(2, 6, 2, dropout=0.3, batch_first=True)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.last(self.layers(x.view(-1, FEATURES // 2, 2))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.last(self.layer(x.view(-1, 2, 4)).mean(1))


class Words(nn.Module):
    """Embeddings that are the last layer's weights, too."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(CLASSES, FEATURES)
        self.last = nn.Linear(FEATURES, CLASSES, bias=False)
        self.last.weight = self.words.weight

    def forward(self, x):
        return self.last(x + self.words((x[:, 0] > 0).long()))


class Waves(nn.Module):
    """Complex parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES, CLASSES, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(torch.complex64) @ self.weight.conj()).abs()


class StochasticDepth(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.last = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        kept = torch.empty(len(x), 1).bernoulli_(0.7)
        return self.last(x + kept * self.block(x).tanh())


class Routed(nn.Module):
    """Experts that fill a buffer of `torch.empty` in parts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(FEATURES, CLASSES) for _ in range(2))

    def forward(self, x):
        y = torch.empty(len(x), CLASSES)
        first = x[:, 0] > 0
        y[first], y[~first] = self.experts[0](x[first]), self.experts[1](x[~first])
        return y


class Scratch(nn.Module):
    """Memory that nothing has written yet, in a buffer and beside it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("buffer", torch.empty(BATCH, FEATURES), persistent=False)
        self.scratch = torch.empty(BATCH, FEATURES)
        self.last = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        if self.training and len(x) == BATCH:
            self.buffer.copy_(x)
            torch.mul(x, 2, out=self.scratch)
            x = self.buffer + self.scratch
        return self.last(x)


class Pictures(nn.Sequential):
    def __init__(self):
        super().__init__(
            *(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)),
            *(nn.RReLU(), nn.Dropout2d(0.2), nn.Flatten(), nn.Linear(16, CLASSES)),
        )


class Ema:
    """An average of the weights that knows nothing of PyTorch's."""

    def __init__(self, model, decay=0.9):
        self.decay = decay
        self.shadow = {k: v.clone() for k, v in model.state_dict().items()}

    def update(self, model):
        for key, value in model.state_dict().items():
            self.shadow[key].mul_(self.decay).add_(value, alpha=1 - self.decay)

    def state_dict(self):
        return {"decay": self.decay, "shadow": self.shadow}

    def load_state_dict(self, state):
        self.decay, self.shadow = state["decay"], state["shadow"]


def ema(device):
    """The average takes part in the loss."""
    torch.manual_seed(1)
    model, (x, y) = mlp(), data()
    optimizer, average = torch.optim.Adam(model.parameters(), 0.01), Ema(model)

    def step(n):
        rows = rows_of(n)
        optimizer.zero_grad()
        with torch.no_grad():
            wanted = torch.func.functional_call(model, average.shadow, (x[rows],))
        (F.cross_entropy(model(x[rows]), y[rows]) + F.mse_loss(model(x[rows]), wanted)).backward()
        optimizer.step()
        average.update(model)

    return ck.audit.Training(model, optimizer, step, state={"ema": average})


def swa(device):
    torch.manual_seed(1)
    model = mlp()
    average = swa_utils.AveragedModel(model)
    training = simple(model, after_step=lambda n: average.update_parameters(model))
    training.state["scheduler"] = scheduler = swa_utils.SWALR(training.optimizer, 0.05, 2)
    training.state["swa"] = average

    def step(n):
        training.step(n)
        scheduler.step()

    return ck.audit.Training(model, training.optimizer, step, state=training.state)


def gan(device):
    torch.manual_seed(1)
    x, _ = data()
    generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, FEATURES))
    discriminator = nn.Sequential(nn.Linear(FEATURES, 8), nn.LeakyReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(generator.parameters(), 0.01)
    optimizer_d = torch.optim.RMSprop(discriminator.parameters(), 0.01)

    def step(n):
        for _ in range(2):
            optimizer_d.zero_grad()
            fake = generator(torch.randn(BATCH, 4)).detach()
            (discriminator(fake).mean() - discriminator(x[rows_of(n)]).mean()).backward()
            optimizer_d.step()
            for p in discriminator.parameters():
                p.data.clamp_(-0.1, 0.1)
        optimizer.zero_grad()
        (-discriminator(generator(torch.randn(BATCH, 4))).mean()).backward()
        optimizer.step()

    named = {"discriminator": discriminator, "optimizer_d": optimizer_d}
    return ck.audit.Training(generator, optimizer, step, state=named)


def amp(device):
    torch.manual_seed(1)
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)

    def step(n):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x[rows_of(n)]), y[rows_of(n)])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return ck.audit.Training(model, optimizer, step, state={"scaler": scaler})


def accumulation(device):
    torch.manual_seed(1)
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)

    def step(n):
        optimizer.zero_grad()
        for half in rows_of(n).chunk(2):
            (F.cross_entropy(model(x[half]), y[half]) / 2).backward()
        optimizer.step()

    return ck.audit.Training(model, optimizer, step)


def clipped(device):
    torch.manual_seed(1)
    model = mlp()
    return simple(model, before_step=lambda n: nn.utils.clip_grad_value_(model.parameters(), 0.01))


def lbfgs(device):
    torch.manual_seed(1)
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)

    def step(n):
        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows_of(n)]), y[rows_of(n)])
            loss.backward()
            return loss

        optimizer.step(closure)

    return ck.audit.Training(model, optimizer, step)


def loader(make_batches):
    """Batches come from an iterator over a shuffling loader."""

    def build(device):
        torch.manual_seed(1)
        model = mlp(nn.Dropout(0.2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        batches = make_batches(DataLoader(TensorDataset(*data()), BATCH // 2, shuffle=True))

        def step(n):
            x, y = next(batches)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        return ck.audit.Training(model, optimizer, step, state={"batches": batches})

    return build


def endless(batches):
    while True:
        yield from batches


def mixup(device):
    """Pairs of rows, mixed by a generator of its own."""
    torch.manual_seed(1)
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(3)

    def step(n):
        share = torch.rand((), generator=generator)
        other = torch.randperm(BATCH, generator=generator)
        one, rows = x[rows_of(n)], y[rows_of(n)]
        logits = model(share * one + (1 - share) * one[other])
        loss = share * F.cross_entropy(logits, rows)
        optimizer.zero_grad()
        (loss + (1 - share) * F.cross_entropy(logits, rows[other])).backward()
        optimizer.step()

    return ck.audit.Training(model, optimizer, step, state={"generator": generator})


def codistillation(device):
    torch.manual_seed(1)
    models, (x, y) = [mlp(), mlp()], data()
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]

    def step(n):
        logits = [model(x[rows_of(n)]) for model in models]
        for optimizer in optimizers:
            optimizer.zero_grad()
        ck.codistillation_loss(logits, y[rows_of(n)]).backward()
        for optimizer in optimizers:
            optimizer.step()

    named = {"partner": models[1], "optimizer_of_partner": optimizers[1]}
    return ck.audit.Training(models[0], optimizers[0], step, state=named)


def frozen(device):
    torch.manual_seed(1)
    model = mlp()
    model[0].requires_grad_(False)
    return simple(model)


def groups(device):
    torch.manual_seed(1)
    model = mlp()
    parts = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}]
    return simple(model, lambda _: torch.optim.AdamW(parts, 0.1))


def compiled(device):
    torch.manual_seed(1)
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = torch.compile(model, backend="aot_eager")

    def step(n):
        optimizer.zero_grad()
        F.cross_entropy(run(x[rows_of(n)]), y[rows_of(n)]).backward()
        optimizer.step()

    return ck.audit.Training(model, optimizer, step)


def teacher(device):
    """A momentum teacher, copied through `.data`, whose own buffers are not in any state_dict."""
    torch.manual_seed(1)
    model, (x, y) = mlp(nn.BatchNorm1d(12)), data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    follower = copy.deepcopy(model)
    follower.register_buffer("center", torch.zeros(CLASSES), persistent=False)

    def step(n):
        rows = rows_of(n)
        with torch.no_grad():
            wanted = follower(x[rows])
            follower.center = 0.9 * follower.center + 0.1 * wanted.mean(0)
        optimizer.zero_grad()
        logits = model(x[rows])
        (F.cross_entropy(logits, y[rows]) + F.mse_loss(logits, wanted - follower.center)).backward()
        optimizer.step()
        for p, q in zip(follower.parameters(), model.parameters(), strict=True):
            p.data.mul_(0.9).add_(q.data, alpha=0.1)

    return ck.audit.Training(model, optimizer, step, state={"teacher": follower})


def no_module(device):
    """A tensor that no model has, and another with an optimizer of its own."""
    x, y = data()
    weight = torch.randn(FEATURES, CLASSES, requires_grad=True)
    log_scale = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([weight], 0.1)
    optimizer_of_scale = torch.optim.Adam([log_scale], 0.01)

    def step(n):
        optimizer.zero_grad()
        optimizer_of_scale.zero_grad()
        F.cross_entropy(x[rows_of(n)] @ weight * log_scale.exp(), y[rows_of(n)]).backward()
        optimizer.step()
        optimizer_of_scale.step()

    named = {"optimizer_of_scale": optimizer_of_scale}
    return ck.audit.Training(nn.Module(), optimizer, step, state=named)


def first_parameter(training, name="optimizer"):
    optimizer = training.optimizer if name == "optimizer" else training.state[name]
    return optimizer.param_groups[0]["params"][0]


def pruned_mlp():
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    return model


def sequential(optimizer):
    kinds = [
        lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2),
        lr_scheduler.ExponentialLR(optimizer, 0.9),
    ]
    return lr_scheduler.SequentialLR(optimizer, kinds, [2])


SCRIPTS = {
    "mlp": of(mlp),
    "adam": of(mlp, lambda p: torch.optim.Adam(p, 0.01, amsgrad=True)),
    "adagrad": of(mlp, lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.01)),
    "dropout": of(lambda: mlp(nn.Dropout(0.5), nn.AlphaDropout(0.1))),
    "pictures": of(Pictures),
    "lstm": of(Recurrent),
    "gru": of(lambda: Recurrent(nn.GRU)),
    "attention": of(Attention),
    "tied embeddings": of(Words),
    "complex": of(Waves),
    "stochastic depth": of(StochasticDepth),
    "routed": of(Routed),
    "scratch": of(Scratch),
    "weight norm": of(lambda: mlp(parametrizations.weight_norm(nn.Linear(12, 12)))),
    "spectral norm": of(lambda: mlp(parametrizations.spectral_norm(nn.Linear(12, 12)))),
    "parametrization": of(pruned_mlp),
    "cosine": scheduled(lambda o: lr_scheduler.CosineAnnealingLR(o, 10)),
    "one cycle": scheduled(lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=200)),
    "cyclic": scheduled(lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3)),
    "lambda": scheduled(lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n)),
    "plateau": scheduled(lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0)),
    "sequence of schedules": scheduled(sequential),
    "ema": ema,
    "swa": swa,
    "gan": gan,
    "amp": amp,
    "accumulation": accumulation,
    "clipping": clipped,
    "lbfgs": lbfgs,
    "loader": loader(lambda batches: iter(batches)),
    "generator of batches": loader(lambda batches: ck.audit.Rewindable(endless(batches))),
    "list of batches": loader(lambda batches: iter([*batches, *batches])),
    "mixup": mixup,
    "codistillation": codistillation,
    "frozen": frozen,
    "groups": groups,
    "compiled": compiled,
    "teacher": teacher,
    "no module": no_module,
}
