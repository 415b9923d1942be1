"""The Trainers themselves as oracles: what their arguments do is what the table's rows do."""

import logging
import math
import warnings

import loopkit as lk
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from problems import classifier, make_state

pytestmark = pytest.mark.filterwarnings("ignore")  # of the Trainers and what they import
BATCHES, TOTAL, PEAK = 8, 200, 3e-4
INPUTS = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))
LABELS = torch.randint(3, (40,), generator=torch.Generator().manual_seed(4))
LOADER = DataLoader(TensorDataset(INPUTS, LABELS), 5)


@pytest.fixture(scope="module")
def lightning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("lightning")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return found


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


def fitted(lightning, losses=(), callbacks=(), **arguments):
    """A Lightning training: its trainer, and the updates after which it validated."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.validated = make_state().model, []

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.seen = getattr(self, "seen", 0) + 1

        def on_validation_epoch_end(self):
            self.validated.append((self.trainer.global_step, self.seen))
            self.seen = 0
            if losses:
                self.log("loss", losses[min(len(self.validated), len(losses)) - 1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    trainer = lightning.Trainer(callbacks=[*callbacks], **quiet, **arguments)
    module = Module()
    trainer.fit(module, LOADER, LOADER)
    return trainer, module.validated


def looped(due, **limits):
    """The updates of a run after which something was due."""
    return [s.step for s in lk.run(classifier, make_state(), LOADER, **limits) if due(s)]


@pytest.mark.parametrize(
    ("arguments", "due", "limits"),
    [
        ({"check_val_every_n_epoch": 2, "max_epochs": 5}, lk.every("2 epochs"), {}),
        ({"val_check_interval": 0.25, "max_epochs": 2}, lk.every("0.25ep"), {}),
        ({"val_check_interval": 3, "max_epochs": 2}, lambda state: state.batch % 3 == 0, {}),
        (
            {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 2},
            lk.every(3),
            {},
        ),
        (
            {"limit_train_batches": 0.6, "max_epochs": 3},
            lk.every("epoch"),
            {"limit_batches": 0.6},
        ),
        ({"limit_train_batches": 3, "max_epochs": 3}, lk.every("epoch"), {"limit_batches": 3}),
        ({"max_steps": 11, "val_check_interval": 0.5, "max_epochs": 9}, lk.every("0.5ep"), {}),
    ],
)
def test_lightning_validates_after_these_updates(lightning, arguments, due, limits):
    """`check_val_every_n_epoch`, `val_check_interval`, `limit_train_batches`, `max_steps`."""
    trainer, validated = fitted(lightning, **arguments)
    ends = {name: arguments[name] for name in ("max_epochs", "max_steps") if name in arguments}
    assert looped(due, **ends, **limits) == [step for step, _ in validated]
    run = lk.run(classifier, make_state(), LOADER, **ends, **limits)
    assert run.finish().step == trainer.global_step


@pytest.mark.parametrize("limit", [1, 3, 0.25, 0.6, 1.0])
def test_lightning_evaluates_so_many_batches(lightning, limit):
    """`limit_val_batches` as a number and as a fraction."""
    _, validated = fitted(lightning, max_epochs=1, limit_val_batches=limit)
    seen = []

    def step(state, batch):
        seen.append(len(batch[1]))
        return classifier(state, batch)

    lk.evaluate(step, make_state(), LOADER, limit_batches=limit)
    assert len(seen) == validated[0][1]


@pytest.mark.parametrize("accumulated", [1, 3, 4, 9])
@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 5, "max_epochs": 3}])
def test_lightning_estimates_as_many_updates(lightning, accumulated, limits):
    """`estimated_stepping_batches` is `total_steps`, and what happens."""
    trainer, _ = fitted(lightning, accumulate_grad_batches=accumulated, **limits)
    run = lk.run(lk.with_grad_accum(accumulated)(classifier), make_state(), LOADER, **limits)
    assert run.total_steps == trainer.estimated_stepping_batches == trainer.global_step
    assert run.finish().step == trainer.global_step


@pytest.mark.parametrize("least", [{"min_epochs": 5}, {"min_steps": 20}, {"min_epochs": 1}])
def test_lightning_stops_no_sooner(lightning, least):
    """`min_epochs` and `min_steps` beside an EarlyStopping, as a condition in the loop."""
    losses = [1.0, 0.9, 1.0, 1.0, 1.0]
    callback = lightning.pytorch.callbacks.EarlyStopping("loss", patience=1)
    trainer, _ = fitted(lightning, losses, [callback], max_epochs=9, **least)
    stop, epochs, steps = lk.EarlyStopping("loss", patience=1), 0, 0
    epochs, steps = least.get("min_epochs", 0), least.get("min_steps", 0)
    for state in lk.run(classifier, make_state(), LOADER, max_epochs=9):
        if state.epoch_end:
            stopping = stop({"loss": losses[min(state.epoch, 4)]})
            if stopping and state.epoch + 1 >= epochs and state.step >= steps:
                break
    assert state.step == trainer.global_step


# Hugging Face


def hf_trained(transformers, folder, **arguments):
    """A Hugging Face training: its trainer, and the updates of each kind of event."""
    events = {"log": [], "save": [], "evaluate": []}

    class Watch(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **more):
            if "loss" in logs:
                events["log"].append(state.global_step)

        def on_save(self, args, state, control, **more):
            events["save"].append(state.global_step)

        def on_evaluate(self, args, state, control, **more):
            events["evaluate"].append(state.global_step)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_state().model

        def forward(self, inputs, labels):
            logits = self.net(inputs)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    data = [{"inputs": x, "labels": y} for x, y in zip(INPUTS, LABELS, strict=True)]
    settings = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=5, use_cpu=True, report_to=[], disable_tqdm=True,
        **arguments,
    )  # fmt: skip
    trainer = transformers.Trainer(
        Net(), settings, train_dataset=data, eval_dataset=data, callbacks=[Watch()]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer, events


@pytest.mark.parametrize("epochs", [1, 2.5, 0.3])
def test_hugging_face_trains_for_parts_of_epochs(transformers, tmp_path, epochs):
    """`num_train_epochs` as a fraction ends after as many updates."""
    trainer, _ = hf_trained(transformers, tmp_path, num_train_epochs=epochs, save_strategy="no")
    run = lk.run(classifier, make_state(), LOADER, max_epochs=epochs)
    assert run.finish().step == trainer.state.global_step


TIMES = {
    "steps": (
        {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 5, "save_steps": 6},
        lambda total: {"evaluate": lk.every(3), "log": lk.every(5), "save": lk.every(6)},
    ),
    "epochs": (
        dict.fromkeys(("eval_strategy", "logging_strategy", "save_strategy"), "epoch"),
        lambda total: dict.fromkeys(("evaluate", "log", "save"), lk.every("epoch")),
    ),
    "parts of the run, and the first": (
        {"eval_strategy": "steps", "eval_steps": 0.1, "logging_steps": 7,
         "logging_first_step": True, "save_strategy": "no"},
        lambda total: {
            "evaluate": lk.every(math.ceil(0.1 * total)),
            "log": lk.every(7, first=True),
            "save": None,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TIMES)
def test_hugging_face_does_it_after_these_updates(transformers, tmp_path, case):
    """Strategies, and intervals in updates and as parts of the run; it saves at the end, too."""
    arguments, made = TIMES[case]
    trainer, events = hf_trained(transformers, tmp_path, num_train_epochs=3, **arguments)
    total = lk.run(classifier, make_state(), LOADER, max_epochs=3).total_steps
    assert total == trainer.state.max_steps
    for event, due in made(total).items():
        steps = [] if due is None else looped(due, max_epochs=3)
        found = [*dict.fromkeys(events[event])]
        end = [total] if due is not None and event == "save" and total not in steps else []
        assert found == steps + end, event


SCHEDULERS = {
    "linear": ({}, lk.linear()),
    "cosine": ({}, lk.cosine()),
    "cosine_with_restarts": ({"num_cycles": 3}, lk.cosine_with_restarts(cycles=3)),
    "cosine_with_min_lr": ({"min_lr_rate": 0.1}, lk.cosine(floor=0.1 * PEAK)),
    "polynomial": ({"power": 2.0}, lk.polynomial(power=2.0, floor=1e-7)),
    "constant_with_warmup": ({}, lk.constant()),
    "inverse_sqrt": ({"timescale": 50}, lk.inverse_sqrt(timescale=50)),
    "warmup_stable_decay": (
        {"num_decay_steps": 70, "num_stable_steps": 100, "decay_type": "linear"},
        lk.constant(100) >> lk.linear(70),
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_hugging_faces_schedulers_set_these_rates(transformers, name):
    """`lr_scheduler_type` with `warmup_steps`: each rate of two hundred updates."""
    options, phase = SCHEDULERS[name]
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=PEAK)
    scheduler = transformers.get_scheduler(name, optimizer, 30, TOTAL, options or None)
    schedule = (lk.warmup(30, peak=PEAK) >> phase).over(TOTAL)
    for n in range(TOTAL):
        assert schedule(n) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15), n
        optimizer.step()
        scheduler.step()


def models(transformers):
    """Small models of several kinds, from their configurations."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = transformers.LlamaConfig(
        vocab_size=32, intermediate_size=16, num_key_value_heads=2, **small
    )
    bert = transformers.BertConfig(vocab_size=32, intermediate_size=16, **small)
    gpt2 = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    return {
        "bert": transformers.BertForSequenceClassification(bert),
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
        "llama": transformers.LlamaForCausalLM(llama),
    }


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_hugging_face_decays_the_same_parameters(transformers, tmp_path, kind):
    """`weight_decay`: all but biases and norms, whatever they are called."""
    model = models(transformers)[kind]
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    wanted = {*transformers.Trainer(model, arguments).get_decay_parameter_names(model)}
    optimizer = lk.configure_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]
        for group in optimizer.param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    assert found == wanted & {*names.values()}
    assert len(names) > len(found) > 0


def test_hugging_face_smooths_labels_so(transformers):
    """`label_smoothing_factor` is torch's `label_smoothing`, over the labels that count."""
    from transformers.trainer_pt_utils import LabelSmoother

    logits, labels = torch.randn(6, 5, 7, dtype=torch.float64), torch.randint(7, (6, 5))
    labels[0, :3] = -100
    theirs = LabelSmoother(epsilon=0.1)({"logits": logits}, labels.clone())
    ours = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)  # theirs adds up in float32


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 4])
def test_hugging_faces_collator_pads_so(transformers, side, multiple):
    """`DataCollatorForTokenClassification`: tokens, labels and mask, on either side."""
    from tokenizers import Tokenizer, models

    words = {f"w{n}": n for n in range(9)} | {"[PAD]": 9}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "[PAD]")),
        pad_token="[PAD]",  # noqa: S106 - of text
        padding_side=side,
    )
    rows = [{"input_ids": [*range(1, n)], "labels": [*range(1, n)]} for n in (3, 7, 2, 6)]
    collator = transformers.DataCollatorForTokenClassification(
        tokenizer, pad_to_multiple_of=multiple
    )
    theirs = collator([{**row} for row in rows])
    pads = {"input_ids": 9, "labels": -100}
    ours = lk.pad_collate(pads, mask="attention_mask", multiple_of=multiple or 1, side=side)(rows)
    assert ours.keys() == {*theirs}
    assert all(torch.equal(ours[name].long(), theirs[name]) for name in ours)


def test_hugging_faces_names_of_optimizers_lead_to_ours(transformers):
    """`optim`: each of theirs that is here under another name is named by the error."""
    theirs = [name.value for name in transformers.training_args.OptimizerNames]
    told = {}
    for name in theirs:
        try:
            lk.create_optimizer([nn.Parameter(torch.ones(2, 2))], name, lr=0.1)
        except lk.MissingExtraError:
            continue
        except lk.UsageError as error:
            told[name] = error.instead
    ours = ("adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "adamw_torch_4bit")
    assert [told[name] for name in ours] == [
        "'adamw'", "'adamw', fused=True", "'adamw_8bit'", "'adamw_4bit'"
    ]  # fmt: skip
    here = {"sgd", "adagrad", "rmsprop", "adafactor", "schedule_free_adamw", "schedule_free_sgd"}
    assert here <= {*theirs} - {*told}
