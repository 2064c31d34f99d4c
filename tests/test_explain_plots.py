"""The pictures of an explanation: they ask a question, name their events, and survive small and odd tables."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_explain_report import loud, one_stay

from clinical_lf.explain_plots import FIGURES, draw_captum_attributions, draw_figure, draw_figures
from clinical_lf.explain_report import FLOOR

NAMES = (
    "layer_attention_weights sequence_importance sequence_importance_combined head_specialization feature_importance "
    "item_importance query_vector_analysis captum_attributions captum_layer_attributions captum_ablation_attributions "
    "deletion_insertion"
).split()
CAPTION = "text encoder: hashing · 5 unseen stays of 5 patients"


@pytest.fixture(scope="module")
def tables(explained):
    return loud(explained)


@pytest.fixture(scope="module")
def figures(tables):
    return draw_figures(tables, CAPTION)


def words_of(figure):
    return " ".join(" ".join(text.get_text() for text in figure.findobj(Text)).split())


@pytest.mark.parametrize("name", NAMES)
def test_figure_asks_a_question_and_says_what_it_explains_and_of_whom(figures, name):
    figure = figures[name]
    assert isinstance(figure, Figure) and figure.get_figwidth() == 7.2 and "?" in figure.get_suptitle()
    caption = " ".join(figure.get_supxlabel().split())
    assert "explains this model, not causes of death" in caption and CAPTION in caption
    assert any(axes.get_xlabel() for axes in figure.axes)
    figure.draw_without_rendering()  # a text of mathematics that is none, "$x_{$", would raise here
    if name in ("sequence_importance", "sequence_importance_combined", "captum_attributions"):
        assert "<script>" in words_of(figure)  # events are named by their text, hostile or not


def test_feature_importance_shows_types_systems_and_statics_by_name_with_n(figures, tables):
    words, n_labs = words_of(figures["feature_importance"]), (tables["events"]["event_type"] == "labevent").sum()
    for expected in ("IV ingredient", "circulation", "admission type", f"{n_labs} / 5"):
        assert expected in words


def test_head_specialization_counts_only_heads_that_move_the_logit(tables):
    heads = tables["heads"].assign(effect=0.0)
    heads.loc[(heads["layer"] == "pooling") & (heads["head"] <= 3), "effect"] = 2 * FLOOR
    assert "3 of 8 heads matter" in words_of(draw_figure("head_specialization", {"heads": heads}))
    assert "0 of 8 heads matter" in words_of(draw_figure("head_specialization", {"heads": heads.assign(effect=0.0)}))


@pytest.mark.slow
def test_figures_survive_one_stay_without_label_and_without_heads(tables):
    drawn = draw_figures(one_stay(tables) | {"curves": tables["curves"]})
    assert {*drawn, "head_specialization"} == set(NAMES) == set(FIGURES)
    assert "outcome unknown" in words_of(drawn["captum_attributions"])
    for figure in drawn.values():
        figure.draw_without_rendering()


def test_pictures_of_checks_and_layers_are_drawn_only_where_there_are_any(tables):
    attention = tables["attention"] | {"layer_attention_weights": []}
    drawn = draw_figures(tables | {"curves": tables["curves"][:0], "attention": attention})
    assert set(NAMES) - set(drawn) == {"deletion_insertion", "layer_attention_weights", "captum_layer_attributions"}


def test_maps_of_a_long_stay_have_the_hours_of_its_end(tables):
    attention, hours = tables["attention"] | {"n_mapped": 3000}, np.arange(5000.0)[::-1]
    events = pd.DataFrame({"icu_stay_id": attention["icu_stay_id"], "event": np.arange(5000), "hours_to_end": hours})
    figure = draw_figure("layer_attention_weights", tables | {"attention": attention, "events": events})
    ticks = [[label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes]
    assert "3000 events" in figure.get_suptitle() and ["2999", "1499", "0"] in ticks


def test_every_stay_can_be_drawn_with_its_events_for_and_against(tables):
    n_events = tables["events"]["icu_stay_id"].value_counts()
    for stay in tables["stays"].itertuples():
        words = words_of(draw_captum_attributions(tables, CAPTION, stay.icu_stay_id))
        assert f"stay {stay.icu_stay_id}?" in words and f"All {n_events[stay.icu_stay_id]} events" in words
        assert ("not complete" in words) != stay.complete


def test_pushes_that_do_not_matter_are_said_not_to_and_of_how_many_events_replacements_are(tables):
    events, draw = tables["events"], partial(draw_figure, "sequence_importance_combined")
    words = lambda **changed: words_of(draw(tables | {"events": events.assign(**changed)}))
    quiet = words(attribution=0.001, if_absent=0.0, relevance=0.0, attention=0.04)
    assert quiet.count("none of 27 reaches 0.05") == 3 and "rollout" in words(in_history="lowest of 2")
    n_events = (events["icu_stay_id"] == tables["attention"]["icu_stay_id"]).sum()
    assert f"20 of {n_events} events" in words(if_absent=events["if_absent"].where(events["event"] < 20))


def test_deletion_and_insertion_are_the_means_over_stays(tables):
    curves, figure = tables["curves"], draw_figure("deletion_insertion", tables)
    for axes, direction in zip(figure.axes, ("deletion", "insertion")):
        of_push = curves[(curves["direction"] == direction) & (curves["order"] == "attribution")]
        expected = of_push.groupby("fraction")["change"].mean()
        np.testing.assert_allclose(axes.lines[0].get_xydata(), np.column_stack([100 * expected.index, expected]))
    assert "measured on 2 stays" in words_of(figure)
