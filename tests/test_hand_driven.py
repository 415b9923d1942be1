"""Loops that people write themselves, against the same loops in plain PyTorch, bit for bit."""

import copy
import itertools

import loopkit as lk
import torch
from loopkit.testing import assert_bitwise_equal
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

from problems import classifier, make_batches, make_state


def adam(model, lr=0.01):
    return torch.optim.Adam(model.parameters(), lr=lr)


def assert_same_weights(ours, theirs):
    assert_bitwise_equal(ours.state_dict(), theirs.state_dict())


def test_a_gan_of_two_models_and_two_optimizers_stepped_in_turn():
    """Discriminator and generator steps in one plain loop train as the loop by hand."""
    torch.manual_seed(0)
    generator, discriminator = (
        nn.Linear(2, 3),
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
    )
    their_g, their_d = copy.deepcopy(generator), copy.deepcopy(discriminator)
    ones, zeros = torch.ones(8, 1), torch.zeros(8, 1)
    bce = F.binary_cross_entropy_with_logits

    @lk.with_clip(1.0)
    def discriminator_step(state, batch):
        real, fake = batch
        return bce(state.model(real), ones) + bce(state.model(fake), zeros)

    def generator_step(state, noise):
        return bce(discriminator(state.model(noise)), ones)

    g_step = lk.train_step(generator_step)
    d = lk.TrainState(discriminator, adam(discriminator))
    g = lk.TrainState(generator, adam(generator))
    torch.manual_seed(1)
    for _ in range(10):
        real, noise = torch.randn(8, 3), torch.randn(8, 2)
        d = discriminator_step(d, (real, g.model(noise).detach()))
        g = g_step(g, noise)

    d_optimizer, g_optimizer = adam(their_d), adam(their_g)
    torch.manual_seed(1)
    for _ in range(10):
        real, noise = torch.randn(8, 3), torch.randn(8, 2)
        d_optimizer.zero_grad()
        fake = their_g(noise).detach()
        (bce(their_d(real), ones) + bce(their_d(fake), zeros)).backward()
        nn.utils.clip_grad_norm_(their_d.parameters(), 1.0)
        d_optimizer.step()
        g_optimizer.zero_grad()
        bce(their_d(their_g(noise)), ones).backward()
        g_optimizer.step()
    assert_same_weights(discriminator, their_d)
    assert_same_weights(generator, their_g)


def test_a_policy_gradient_on_data_that_the_loop_makes():
    """REINFORCE on a two-armed bandit, sampled from the policy itself, trains as by hand."""

    def rollout(policy):
        with torch.no_grad():
            actions = torch.distributions.Categorical(logits=policy(torch.ones(16, 1))).sample()
        return actions, (actions == 1).float() - 0.5

    def loss_of(policy, actions, rewards):
        return -(
            policy(torch.ones(16, 1)).log_softmax(1)[torch.arange(16), actions] * rewards
        ).mean()

    @lk.train_step
    def policy_step(state, batch):
        return loss_of(state.model, *batch)

    torch.manual_seed(0)
    ours = nn.Linear(1, 2)
    theirs = copy.deepcopy(ours)
    state = lk.TrainState(ours, adam(ours, 0.1))
    torch.manual_seed(1)
    for _ in range(40):
        state = policy_step(state, rollout(state.model))

    optimizer = adam(theirs, 0.1)
    torch.manual_seed(1)
    for _ in range(40):
        actions, rewards = rollout(theirs)
        optimizer.zero_grad()
        loss_of(theirs, actions, rewards).backward()
        optimizer.step()
    assert_same_weights(ours, theirs)
    assert theirs(torch.ones(1, 1)).argmax() == 1


def test_a_recurrent_hidden_state_carried_from_batch_to_batch():
    """Truncated backpropagation, with the hidden state in extras, trains as by hand."""

    def loss_of(model, hidden, inputs):
        outputs, hidden = model(inputs, hidden)
        return outputs.square().mean(), hidden.detach()

    @lk.train_step
    def recurrent_step(state, inputs):
        loss, state.extras["hidden"] = loss_of(state.model, state.extras["hidden"], inputs)
        return loss

    torch.manual_seed(0)
    ours = nn.GRU(3, 4, batch_first=True)
    theirs = copy.deepcopy(ours)
    chunks = [torch.randn(2, 5, 3) for _ in range(6)]
    state = lk.TrainState(ours, adam(ours), hidden=torch.zeros(1, 2, 4))
    for chunk in chunks:
        state = recurrent_step(state, chunk)

    optimizer, hidden = adam(theirs), torch.zeros(1, 2, 4)
    for chunk in chunks:
        optimizer.zero_grad()
        loss, hidden = loss_of(theirs, hidden, chunk)
        loss.backward()
        optimizer.step()
    assert_same_weights(ours, theirs)
    assert_bitwise_equal(state.extras["hidden"], hidden)
    assert "hidden" in state.state_dict()["extras"]


def test_two_steps_that_share_one_model():
    """Two losses with an optimizer each, over parts of one model, train as by hand."""
    torch.manual_seed(0)
    ours = nn.ModuleDict({"body": nn.Linear(4, 4), "a": nn.Linear(4, 3), "b": nn.Linear(4, 1)})
    theirs = copy.deepcopy(ours)

    def a_loss(model, batch):
        return F.cross_entropy(model["a"](model["body"](batch[0])), batch[1])

    def b_loss(model, batch):
        return model["b"](model["body"](batch[0])).square().mean()

    def optimizers(model):
        whole = [*model["body"].parameters(), *model["a"].parameters()]
        return torch.optim.AdamW(whole, lr=0.01), torch.optim.SGD(model["b"].parameters(), lr=0.1)

    first, second = (lk.TrainState(ours, optimizer) for optimizer in optimizers(ours))
    a_step = lk.with_clip(0.5)(lambda state, batch: a_loss(state.model, batch))
    b_step = lk.with_ema(0.9)(lambda state, batch: b_loss(state.model, batch))
    for batch in make_batches():
        a_step(first, batch)
        b_step(second, batch)

    a_optimizer, b_optimizer = optimizers(theirs)
    for batch in make_batches():
        a_optimizer.zero_grad()
        a_loss(theirs, batch).backward()
        nn.utils.clip_grad_norm_([p for g in a_optimizer.param_groups for p in g["params"]], 0.5)
        a_optimizer.step()
        b_optimizer.zero_grad()
        b_loss(theirs, batch).backward()
        b_optimizer.step()
    assert_same_weights(ours, theirs)


def test_two_steps_of_one_state_share_what_equal_decorators_keep():
    """Steps with the same with_ema on one state update one average between them."""
    state = make_state()
    average = lk.with_ema(0.5)
    first, second = average(classifier), average(lambda s, b: classifier(s, b) * 2)
    batch = make_batches(1)[0]
    first(state, batch)
    kept = state.features["ema"]
    second(state, batch)
    assert state.features["ema"] is kept
    assert state.step == 2


def test_lbfgs_which_evaluates_the_loss_itself():
    """with_closure gives LBFGS the gradients anew at each evaluation, also over a window."""
    batches = make_batches(4)

    def make():
        state = make_state()
        return lk.TrainState(
            state.model, torch.optim.LBFGS(state.model.parameters(), lr=0.5, max_iter=5)
        )

    for window in (1, 2):
        ours, theirs = make(), make()
        step = lk.compose(lk.with_closure(), lk.with_grad_accum(window))(classifier)
        losses = [s.loss.isfinite() for s in lk.run(step, ours, batches, max_epochs=2)]

        chunks = [batches[i : i + window] for i in range(0, 4, window)] * 2
        for chunk in chunks:

            def closure(chunk=chunk):
                theirs.optimizer.zero_grad()
                total = 0.0
                for batch in chunk:
                    loss = classifier(theirs, batch) / len(chunk)
                    loss.backward()
                    total += loss.detach()
                return total

            theirs.optimizer.step(closure)
        assert all(losses)
        assert_same_weights(ours.model, theirs.model)


def test_two_runs_interleaved_in_one_process():
    """Two runs taken in turn end as each does alone."""
    step = lk.compose(lk.with_ema(0.9), lk.with_clip(0.1))(classifier)
    alone = [make_state(seed=0), make_state(seed=1)]
    for state in alone:
        for _ in lk.run(step, state, make_batches(), max_epochs=2):
            pass
    together = [make_state(seed=0), make_state(seed=1)]
    runs = [lk.run(step, state, make_batches(), max_epochs=2) for state in together]
    for _ in itertools.zip_longest(*runs):
        pass
    for one, other in zip(alone, together, strict=True):
        ours, theirs = one.state_dict(), other.state_dict()
        assert ours.pop("data").keys() == theirs.pop("data").keys()  # random states are shared
        assert_bitwise_equal(ours, theirs)


def test_a_frozen_part_stays_as_it_is():
    """Frozen parameters and a BatchNorm in eval mode are left alone, and others learn."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    model[1].eval()
    state = lk.TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    step = lk.compose(lk.with_ema(0.9), lk.with_clip(1.0), lk.with_nonfinite("skip"))(classifier)
    for state in lk.run(step, state, make_batches(), max_epochs=2):
        if state.epoch_end:
            lk.evaluate(classifier, state, make_batches())
    after = model.state_dict()
    assert_bitwise_equal(after["0.weight"], before["0.weight"])
    assert_bitwise_equal(after["1.running_mean"], before["1.running_mean"])
    assert not model[1].training
    assert model[2].training
    assert not torch.equal(after["2.weight"], before["2.weight"])


def test_an_update_that_raises_leaves_the_state_as_it_was():
    """A step function that fails leaves weights, optimizer and clock at the update before."""
    state, calls = make_state(), itertools.count()

    def failing(state, batch):
        if next(calls) == 3:
            message = "no"
            raise RuntimeError(message)
        return classifier(state, batch)

    step = lk.compose(lk.with_amp("fp16"), lk.with_ema(0.9))(failing)
    data = make_batches()
    saved = None
    try:
        for state in lk.run(step, state, data, max_epochs=1):
            saved = copy.deepcopy(state.state_dict())
    except RuntimeError:
        pass
    assert state.step == 3
    assert_bitwise_equal(state.state_dict(), saved)
    assert [s.step for s in lk.run(step, state, data, max_epochs=1)] == [4, 5, 6, 7]


def test_a_plateau_scheduler_in_extras_goes_on_after_a_restore():
    """ReduceLROnPlateau, stepped by a score in the loop's body: stopped or not, the same rates."""
    data, scores = make_batches(), (1.0, 0.5, 0.6, 0.6, 0.6, 0.4, 0.4, 0.4, 0.4)

    def train(state, epochs, rates):
        for _ in lk.run(classifier, state, data, max_epochs=epochs):
            if state.epoch_end:
                state.extras["plateau"].step(scores[state.epoch])
                rates.append(state.optimizer.param_groups[0]["lr"])
        return state

    def fresh():
        state = make_state()
        state.extras["plateau"] = ReduceLROnPlateau(state.optimizer, factor=0.5, patience=1)
        return state

    whole, first, rest = [], [], []
    end = train(fresh(), 9, whole)
    stopped, resumed = train(fresh(), 4, first), fresh()
    resumed.load_state_dict(stopped.state_dict())
    train(resumed, 9, rest)
    by_hand = ReduceLROnPlateau(make_state().optimizer, factor=0.5, patience=1)
    wanted = [by_hand.step(score) or by_hand.get_last_lr()[0] for score in scores]
    assert whole == first + rest == wanted
    assert len({*wanted}) > 2
    assert_bitwise_equal(resumed.model.state_dict(), end.model.state_dict())
