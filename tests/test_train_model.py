"""Shapes and truths of the dataset, the batches, the model and the loss; torch's own layers are the oracle."""

import math

import numpy as np
import pytest
import torch
from make_sample import make_sample
from small_table import padded_logits

import train
from clinical_lf.files import InputError
from clinical_lf.items import HISTORY, read_text
from clinical_lf.reading import read_stays

B, L, INPUT, S = 3, 7, 21, 4
SIZES = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_feedforward": 48}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return train.ClinicalTransformer(INPUT, S, **SIZES).eval()


@pytest.fixture
def batch():
    """Sequences of 7, 4 and 4 events, static features and the mask."""
    mask = torch.arange(L) < torch.tensor([7, 4, 4]).unsqueeze(1)
    return torch.randn(B, L, INPUT) * mask.unsqueeze(2), torch.randn(B, S), mask


@pytest.fixture(scope="module")
def dataset():
    table = read_stays(make_sample(30, seed=5).table)[0]
    vectors = np.random.default_rng(0).normal(size=(len(table.texts), 768)).astype(np.float32)
    return train.ClinicalSequenceDataset(table, train.ClinicalDataPreprocessor().fit(table), vectors)


@pytest.fixture
def small_model(dataset):
    return train.ClinicalTransformer(dataset.input_dim, dataset.static.shape[1], **SIZES).eval()


def test_default_model_has_the_shapes_of_the_specification_and_refuses_others_in_a_sentence():
    model = train.ClinicalTransformer(774, 40).eval()
    inputs = torch.randn(2, 9, 774), torch.randn(2, 40), torch.ones(2, 9, dtype=torch.bool)
    probability, attention = model(*inputs, return_attention=True)
    assert probability.shape == (2, 1) and attention["transformer_output"].shape == (2, 9, 256)
    assert attention["pooling_weights"].shape == (2, 4, 1, 9) and attention["query_vector"].shape == (2, 1, 256)
    assert [w.shape for w in attention["layer_attention_weights"]] == [(2, 8, 9, 9)] * 4
    linear = [layer.weight.shape for layer in model.classifier if hasattr(layer, "weight")]
    assert linear == [(256, 296), (128, 256), (1, 128)] and model.query_vector.shape == (1, 1, 256)
    for shape in ((5, 774), (1, 5, 773)):
        with pytest.raises(InputError, match=r"give \(B, L, 774\), a single stay with B = 1"):
            model(torch.ones(shape), torch.zeros(1, 40))


def test_output_of_a_stay_depends_on_no_padding_and_on_no_other_of_its_batch(model, batch):
    (sequences, static, mask), output = batch, model(*batch)
    longer = torch.cat([sequences, torch.full((B, 5, INPUT), 1e6)], dim=1)
    longer[:, :L][~mask] = -7.0
    assert torch.allclose(model(longer, static, torch.nn.functional.pad(mask, (0, 5))), output, atol=1e-5)
    single = [model(sequences[i : i + 1, : mask[i].sum()], static[i : i + 1]) for i in range(B)]
    assert torch.allclose(torch.cat(single), output, atol=1e-5)
    assert torch.allclose(output[[2, 0, 1]], model(*(part[[2, 0, 1]] for part in batch)), atol=1e-6)
    assert torch.isfinite(model(sequences, static, torch.zeros_like(mask))).all()  # stays without events


def test_events_are_normalised_and_static_features_weighed_as_training_says(model, batch):
    (sequences, static, mask), mean, scale = batch, torch.randn(INPUT), torch.rand(INPUT) + 0.5
    by_hand = model((sequences - mean) / scale, 2 * static, mask)
    model.set_input_statistics(mean, scale, torch.full((S,), 2.0))
    assert torch.allclose(model(*batch), by_hand, atol=1e-5)


def test_attention_sums_to_one_over_events_and_is_that_of_the_pass_that_made_the_probability(model, batch):
    """It is zero on padding; from it and the values the probability and a layer's output can be made again."""
    encoder_layer, seen, mask = model.transformer_encoder[0], {}, batch[2]
    encoder_layer.query_key_value.register_forward_hook(lambda m, i, o: seen.setdefault("qkv", o))
    encoder_layer.attention_output.register_forward_hook(lambda m, i, o: seen.setdefault("attended", i[0]))
    probability, attention = model(*batch, return_attention=True)
    value = train.unpack(seen["qkv"], train.layout_of_mask(mask)).unflatten(2, (3, 4, -1))[:, :, 2].transpose(1, 2)
    by_weights = (attention["layer_attention_weights"][0] @ value).transpose(1, 2).flatten(2)[mask]
    assert torch.allclose(by_weights, seen["attended"], atol=1e-5)
    pooling, layer = attention["pooling_weights"], model.attention_pooling
    for weights in (*attention["layer_attention_weights"], pooling):
        is_asking = mask[:, None] if weights.shape[2] > 1 else torch.ones(B, 1, 1)
        assert torch.allclose(weights.sum(-1), is_asking.expand(-1, 4, -1).float(), atol=1e-5)
        assert not (weights * ~mask[:, None, None]).any()
    values = layer.value(attention["transformer_output"]).unflatten(2, (4, -1)).transpose(1, 2)
    pooled = layer.output((pooling @ values).transpose(1, 2).flatten(2)).squeeze(1)
    again = torch.sigmoid(model.classifier(torch.cat([pooled, batch[1]], dim=1)))
    assert torch.allclose(again, probability, atol=1e-6) and torch.allclose(probability, model(*batch), atol=1e-6)


def test_packed_layer_is_the_pre_norm_layer_of_torch():
    packed = train.EncoderLayer(32, 4, 48, 0.1).eval()
    plain = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True).eval()
    theirs = "self_attn.in_proj_ self_attn.out_proj. linear1. linear2. norm1. norm2.".split()
    own = "query_key_value. attention_output. feedforward.0. feedforward.3. norm_attention. norm_feedforward.".split()
    torch.nn.init.ones_(packed.attention_scale)
    torch.nn.init.ones_(packed.feedforward_scale)
    weights, kinds = packed.state_dict(), ("weight", "bias")
    plain.load_state_dict({its + kind: weights[ours + kind] for its, ours in zip(theirs, own) for kind in kinds})
    events, lengths = torch.randn(12, 32), np.array([7, 5])
    found = packed(events, train.layout_of_lengths(lengths, torch.device("cpu"))).split(lengths.tolist())
    for ours, stay in zip(found, events.split(lengths.tolist()), strict=True):
        assert torch.allclose(ours, plain(stay[None])[0], atol=1e-5)


def test_pooling_is_the_multi_head_attention_of_torch():
    ours, theirs = train.AttentionPooling(16, 4), torch.nn.MultiheadAttention(16, 4, batch_first=True)
    projections = [ours.query_projection, ours.key, ours.value]
    for projection in projections:
        torch.nn.init.normal_(projection.bias)
    theirs.in_proj_weight.data = torch.cat([projection.weight.data for projection in projections])
    theirs.in_proj_bias.data = torch.cat([projection.bias.data for projection in projections])
    theirs.out_proj.load_state_dict(ours.output.state_dict())
    query, events, mask = torch.randn(3, 1, 16), torch.randn(3, 7, 16), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    expected = theirs(query, events, events, key_padding_mask=~mask, average_attn_weights=False)
    for found, right in zip(ours(query, events, mask), expected, strict=True):
        assert torch.allclose(found, right, atol=1e-6)


def test_a_share_of_the_events_is_hidden_from_pooling_and_memory_in_training(monkeypatch):
    model, seen = train.ClinicalTransformer(INPUT + 9, S, 32, 0, 4, dropout=0.0, n_history=9), []
    torch.nn.init.zeros_(model.position_scale)
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    events, statics = torch.randn(1, 400, INPUT + 9, requires_grad=True), torch.randn(1, S)
    pass_of = lambda model, events: model(events, statics, return_attention=True)[1]["pooling_weights"][0, :, 0] > 0
    shown = [pass_of(model, events) for _ in range(2)]  # (4 heads, 400) each
    assert all((own == own[0]).all() and 290 < own[0].sum() < 350 for own in shown) and (shown[0] != shown[1]).any()
    assert pass_of(train.ClinicalTransformer(INPUT, S, **SIZES), events[..., :INPUT]).all()  # the default hides none
    assert pass_of(model.eval(), events[:, shown[1][0]]).all()
    assert torch.allclose(seen[1], seen[2], atol=1e-4)
    monkeypatch.setattr(train, "EVENT_DROPOUT", 1.0)
    model.train()(events, statics).sum().backward()
    assert torch.equal(seen[3][0, :32], model.attention_pooling.output.bias)
    assert not seen[3][0, 32 + S :].any() and not events.grad.any()


def test_positions_are_made_for_any_length():
    expected = torch.tensor([[0, 1, 0, 1], [math.sin(1e5), math.cos(1e5), math.sin(1e3), math.cos(1e3)]])
    assert torch.allclose(train.sinusoidal_positions(torch.tensor([0, 100_000]), 4), expected, atol=2e-2)


def test_whitened_items_differ_as_much_in_all_directions_in_which_they_differ():
    n_items, n_columns, variances = 40, 30, torch.tensor([1.0, 4.0, 25.0])  # along three directions
    scores = torch.randn(n_items, 3)
    scores = torch.linalg.qr(scores - scores.mean(0))[0] * (n_items * variances).sqrt()
    items = scores @ torch.linalg.qr(torch.randn(n_columns, 3))[0].T
    projection, identity = train.ItemHistoryProjection(n_columns + 1, 8), torch.nn.Linear(n_columns, n_columns)
    projection.whiten(items)
    identity.weight.data, identity.bias.data = torch.eye(n_columns), torch.zeros(n_columns)
    covariance = torch.cov(projection.of_item(identity, items).T, correction=0)
    expected = torch.nn.functional.pad(variances / (variances + 1e-3 * 25), (0, n_columns - 3))
    assert torch.allclose(covariance, torch.diag(expected), atol=1e-4)


def test_numbers_enter_as_eight_soft_steps_and_only_where_an_event_has_one():
    projection = train.ItemHistoryProjection(INPUT, 52)  # 6 quantiles of 8 steps, 3 other numbers, the time
    for parameter in (projection.text.weight, projection.text.bias, projection.product.weight):
        torch.nn.init.zeros_(parameter)
    torch.nn.init.eye_(projection.numbers.weight)
    events = torch.zeros(4, INPUT + len(HISTORY))
    events[:, INPUT] = torch.tensor([-1, 0.125, 1, 1])  # quantiles of the value
    events[:, INPUT + HISTORY.index("has_value")] = torch.tensor([1.0, 1, 1, 0])
    assert projection(events)[:, :8].tolist() == [[-0.5] * 8, [0.5] * 4 + [0] + [-0.5] * 3, [0.5] * 8, [0] * 8]


def test_the_latest_event_of_an_item_weighs_more_and_its_numbers_are_kept_under_the_key_of_its_text():
    model, inputs, odds = train.ClinicalTransformer(INPUT + 9, S, n_history=9, **SIZES).eval(), {}, []
    sequences, latest = torch.randn(1, 3, INPUT + 9), INPUT + HISTORY.index("is_latest")
    sequences[0, :, latest] = torch.tensor([0.0, 1, 1])
    model.classifier.register_forward_pre_hook(lambda _, given: inputs.update(last=given[0][0]))
    for bias in (train.LATEST_BIAS, 0.0):
        torch.nn.init.constant_(model.input_projection.latest_bias, bias)
        weights = model(sequences, torch.zeros(1, S), return_attention=True)[1]["pooling_weights"][0, :, 0]
        odds.append(weights[:, 1] / weights[:, 0])  # of each head
    assert torch.allclose(odds[0], math.exp(4) * odds[1], rtol=1e-4)
    keys = sequences[0, :, : INPUT - 1] @ model.input_projection.key.weight.T + model.input_projection.key.bias
    kept = sum(torch.outer(keys[event], sequences[0, event, INPUT:]) for event in (1, 2))
    assert torch.allclose(inputs["last"][32 + S :], kept.flatten(), atol=1e-4)


def test_dataset_item_has_774_columns_whole_sequence_oldest_first(dataset):
    (sequence, static, label), table = dataset[3], dataset.table
    assert sequence.shape == (table.lengths[3], 774)
    assert label.shape == (1,) and static.shape == (dataset.static.shape[1],)
    assert (sequence[:-1, 773] >= sequence[1:, 773]).all()  # minutes to the final event fall
    assert torch.equal(sequence[:, :5].sum(1), torch.ones(len(sequence)))
    assert torch.equal(sequence[0, 5:773], dataset.text_vectors[int(table.text[table.offsets[3]])])
    items = train.items_of_events(dataset)  # which are texts without numbers
    assert len(items) == len({read_text(text).without_value for text in table.texts[np.unique(table.text)]})
    assert items.shape[1] == dataset.input_dim - 1 and (items[:, :5].sum(1) == 1).all()


@torch.no_grad()
def test_packed_stays_have_layout_logits_and_losses_of_padded_ones(dataset, small_model):
    stays = np.array([4, 0, 9, 1])
    batch, padded = dataset.packed(stays), train.collate_stays([dataset[stay] for stay in stays])
    mask, lengths = padded["attention_mask"], dataset.lengths[stays].tolist()
    assert all(torch.equal(a, b) for a, b in zip(batch.layout[1:], train.layout_of_mask(mask)[1:]))
    assert batch.layout.lengths == mask.sum(1).tolist() == lengths and len(batch.events) == sum(lengths)
    assert not padded["sequences"][~mask].any() and torch.equal(batch.labels, dataset.labels[stays])
    logits, details = small_model.score_packed(batch.events, batch.static_features, batch.layout)
    assert torch.allclose(logits[:, 0], padded_logits(small_model, dataset)[stays], atol=1e-6)
    table, loss = dataset.table.take(stays), train.TemporalAwareLoss(32)
    objective = train.TrainingObjective(small_model, loss, train.ClinicalDataPreprocessor().fit(dataset.table))
    assert torch.allclose(objective(batch, 773), objective(padded, 773), atol=1e-6)
    hours = train.unpack(torch.from_numpy(table.minutes_to_end[:, None] / 60).float(), batch.layout).squeeze(2)
    by_hand = loss(logits, details["transformer_output"], batch.labels, hours, batch.layout.attention_mask)
    assert torch.allclose(objective(batch, 773), by_hand, atol=1e-5)


def test_batches_gathered_ahead_are_those_gathered_in_turn(dataset, monkeypatch):
    """On a device without the vectors, threads gather; here the device is the CPU under another name."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(train, "send_to_device", lambda batch, device, non_blocking: batch)
    batches = [np.array([stay, stay + 1]) for stay in range(0, 20, 2)]
    in_turn = train.packed_batches(dataset, batches, torch.device("cpu"))
    ahead = list(train.packed_batches(dataset, batches, torch.device("cuda")))
    assert len(ahead) == 10 and all(torch.equal(a.events, b.events) for a, b in zip(ahead, in_turn, strict=True))


@torch.no_grad()
def test_logits_leave_bf16_autocast_in_fp32(dataset, small_model):
    """No ties: only the events' representations are rounded, not the sums that make the logit."""
    with torch.autocast("cpu", torch.bfloat16):
        batch = dataset.packed(np.arange(30))
        logits, details = small_model.score_packed(batch.events, batch.static_features, batch.layout)
        event_logits = train.in_full_precision(torch.nn.Linear(32, 1), details["transformer_output"].bfloat16())
    assert logits.dtype == event_logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    assert len(logits.unique()) == 30 and (logits[:, 0] - padded_logits(small_model, dataset)).abs().max() < 0.02


LENGTHS = np.random.default_rng(0).integers(1, 500, 300)


def test_batches_hold_every_stay_once_within_the_event_budget_mixed_in_training_alike_in_scoring():
    batches, again, other = (train.plan_batches(LENGTHS, batch_size=8, max_events=1000, seed=n) for n in (1, 1, 2))
    assert sorted(np.concatenate(batches)) == list(range(300))
    assert all(len(b) <= 8 and (len(b) == 1 or LENGTHS[b].sum() <= 1000) for b in batches)
    assert all((np.diff(LENGTHS[b]) <= 0).all() for b in batches)
    assert all(map(np.array_equal, batches, again)) and not all(map(np.array_equal, batches, other))
    few = train.plan_batches(np.array([3, 50, 4]), batch_size=8, max_events=10)
    assert [b.tolist() for b in few] == [[1], [2, 0]]  # a stay longer than the budget is a batch of its own
    assert train.plan_batches(np.array([], int), batch_size=8, max_events=10) == []
    lengths = np.random.default_rng(0).lognormal(5.7, 1.1, 500).astype(int) + 1
    mixed, sorted_by_length = (train.plan_batches(lengths, 16, 16384, seed=seed) for seed in (0, None))
    assert 1 - lengths.sum() / sum(lengths[b].max() * len(b) for b in sorted_by_length) < 0.10
    means = [np.log(lengths[b]).mean() for b in mixed if len(b) == 16]
    assert len(means) > 25 and np.std(means) < 1.5 * np.log(lengths).std() / 4  # as of 16 stays drawn at random


def test_processes_share_stays_and_event_budget_of_a_step():
    batches = train.plan_batches(LENGTHS, batch_size=64, max_events=1000, seed=1, world=4)
    assert sorted(np.concatenate(batches)) == list(range(300))
    for batch in batches:
        shares = [train.share_of_batch(batch, rank, 4)[0] for rank in range(4)]
        assert all(len(share) == 1 or LENGTHS[share].sum() <= 1000 for share in shares)
    assert len(batches) < len(train.plan_batches(LENGTHS, batch_size=64, max_events=1000, seed=1))
    shares = [train.share_of_batch(np.array([4, 7, 9]), rank, 4) for rank in range(4)]  # one is left without
    assert sorted(stay for stays, weight in shares if weight for stay in stays) == [4, 7, 9]
    assert all(len(stays) for stays, _ in shares)


def test_input_statistics_are_the_training_mean_and_a_scale_that_gives_text_three_quarters(dataset):
    mean, scale = train.input_statistics(dataset)
    events = torch.cat([dataset[i][0] for i in range(len(dataset))])
    assert torch.allclose(mean, events.mean(0), atol=1e-4)
    variance = ((events - mean) / scale).var(0, correction=0)
    assert [variance[5:773].sum(), variance.sum()] == pytest.approx([0.75 * 774, 774], rel=0.01)


def test_temporal_loss_of_two_events_by_hand_and_plain_bce_without():
    hours, mask = torch.tensor([[24.0, 0.0, 99.0]]), torch.tensor([[True, True, False]])
    older, bce = math.exp(-1) / (1 + math.exp(-1)), lambda logit: math.log1p(math.exp(-logit))
    loss, plain = (train.TemporalAwareLoss(d_model=1, tau_hours=24.0, weight=weight) for weight in (0.3, 0.0))
    torch.nn.init.ones_(loss.event_head.weight)
    torch.nn.init.zeros_(loss.event_head.bias)
    inputs = torch.tensor([[0.5]]), torch.tensor([[[2.0], [-1.0], [7.0]]]), torch.ones(1, 1), hours, mask
    by_hand = 0.7 * bce(0.5) + 0.3 * (older * bce(2.0) + (1 - older) * bce(-1.0))
    assert loss(*inputs).item() == pytest.approx(by_hand, abs=1e-6)
    assert plain(torch.zeros(1, 1), *inputs[1:]).item() == pytest.approx(math.log(2)) and not list(plain.parameters())


@torch.no_grad()
def test_attention_of_a_pass_is_written_and_read_again_bounded_however_long_the_stay(model, batch, tmp_path):
    _, attention = model(*batch, return_attention=True)
    path = train.save_attention_weights(attention, 50, 2, save_dir=tmp_path)
    assert path.name == "attention_epoch_2_batch_50.npz"
    read = train.load_attention_weights(path)
    assert np.allclose(read["pooling_weights"], attention["pooling_weights"]) and "transformer_output" not in read
    for found, weights in zip(read["layer_attention_weights"], attention["layer_attention_weights"], strict=True):
        assert np.allclose(found, weights, atol=1e-3)
    _, attention = model(torch.randn(1, 500, INPUT), torch.randn(1, S), return_attention=True)
    read = train.load_attention_weights(train.save_attention_weights(attention, 0, 1, tmp_path))
    assert read["layer_attention_weights"][0].shape == (1, 4, 64, 64)
