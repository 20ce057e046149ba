"""Near-duplicates, matches between sets and zero-shot classes, against loops over all pairs."""

import networkx as nx
import pytest
import torch

from gallery.groups import accuracy, matches, mean_over_prompts, near_duplicates, zero_shot


def random_features(count, seed):
    """Rows around a few centres, so that some pairs are alike; lengths differ."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1 + count // 3, 8, generator=generator)
    rows = centres[torch.randint(len(centres), (count,), generator=generator)]
    rows = rows + 0.12 * torch.randn(count, 8, generator=generator)
    return rows * (0.1 + torch.rand(count, 1, generator=generator))


def cosine(first, second):
    return torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0).item()


# ------------------------------------------------------------------ pairs


@pytest.mark.parametrize("block", [1, 3, 7, 100])
@pytest.mark.parametrize("seed", range(4))
def test_groups_are_the_components_over_all_pairs(seed, block):
    features = random_features(40, seed)
    graph = nx.Graph()
    graph.add_nodes_from(range(40))
    for i in range(40):
        for j in range(i):
            if cosine(features[i], features[j]) >= 0.98:
                graph.add_edge(i, j)
    expected = [sorted(group) for group in nx.connected_components(graph) if len(group) > 1]
    expected.sort(key=lambda group: (-len(group), group[0]))
    assert expected
    assert near_duplicates(features, threshold=0.98, block=block) == expected


def test_a_chain_is_one_group_though_its_ends_differ():
    angles = torch.tensor([0.0, 10.0, 20.0, 30.0, 90.0]).deg2rad()  # cos 10° = 0.985
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    order = [3, 0, 4, 2, 1]
    assert near_duplicates(features[order], threshold=0.98, block=2) == [[0, 1, 3, 4]]
    assert near_duplicates(features, threshold=0.99) == []


@pytest.mark.parametrize("block", [64, 4096])
def test_many_equal_images_are_one_group_without_a_list_of_their_pairs(block):
    features = torch.ones(1500, 2)
    features[1000:] = torch.tensor([1.0, -1.0])
    groups = near_duplicates(features, threshold=1.0, block=block)
    assert groups == [list(range(1000)), list(range(1000, 1500))]


def test_rows_of_zeros_are_like_none():
    assert near_duplicates(torch.zeros(3, 2), threshold=0.5) == []


@pytest.mark.parametrize("block", [2, 5, 100])
def test_matches_are_the_best_pairs_of_two_sets(block):
    features, others = random_features(30, seed=1), random_features(90, seed=1)[30:60]
    others[:3] = 2 * features[[4, 4, 9]]
    expected = []
    for j in range(30):
        own = [(i, j, cosine(features[i], others[j])) for i in range(30)]
        own = [pair for pair in own if pair[2] >= 0.9]
        expected.append(sorted(own, key=lambda pair: -pair[2]))
    found, number = matches(features, others, threshold=0.9, most=2, block=block)
    assert number == sum(len(own) for own in expected) > len(found) > 3
    assert [pair[2] for pair in found] == sorted((pair[2] for pair in found), reverse=True)
    assert {(0, 4), (1, 4), (2, 9)} <= {(j, i) for i, j, value in found if value == 1.0}
    for j in range(30):
        own = [pair for pair in found if pair[1] == j]
        assert [pair[0] for pair in own] == [pair[0] for pair in expected[j][:2]]
        values = [pair[2] for pair in expected[j][:2]]
        assert [pair[2] for pair in own] == pytest.approx(values, abs=1e-5)


def test_of_many_equal_pairs_each_row_keeps_its_most_and_all_are_counted():
    found, number = matches(torch.ones(50, 2), torch.ones(20, 2), threshold=0.9, most=3, block=8)
    assert number == 1000 and len(found) == 60
    assert {pair[2] for pair in found} == {1.0}


def test_sets_without_rows_or_pairs_have_no_matches():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert matches(one, other, threshold=0.5) == ([], 0)
    assert matches(one[:0], other, threshold=0.5) == matches(one, other[:0], 0.5) == ([], 0)
    assert near_duplicates(one[:0], threshold=0.5) == []


# ------------------------------------------------------------------ classes


def test_the_feature_of_a_class_is_the_mean_of_its_prompts_at_length_one():
    # Of lengths 3 and 2: as units (1, 0) and (0, 1), their mean (1, 1) / 2, at length one 0.7071.
    prompts = torch.tensor([[[3.0, 0.0], [0.0, 2.0]], [[0.0, -1.0], [0.0, -5.0]]])
    found = mean_over_prompts(prompts)
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))


@pytest.mark.parametrize("block", [1, 2, 9])
def test_the_class_is_that_with_the_largest_cosine(block):
    classes = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, -1.0]])
    features = torch.tensor([[3.0, 4.0], [5.0, 0.0], [0.6, -0.8]])
    # Cosines: 0.6, 0.8, -0.8; 1, 0, 0; 0.6, -0.8, 0.8.
    places, scores, margins = zero_shot(features, classes, block=block)
    assert places.tolist() == [1, 0, 2]
    assert scores.tolist() == pytest.approx([0.8, 1.0, 0.8])
    assert margins.tolist() == pytest.approx([0.2, 1.0, 0.2])
    assert [len(part) for part in zero_shot(features[:0], classes)] == [0, 0, 0]


def test_accuracy_is_over_all_and_by_class():
    true = ["beach", "airport", "beach", "beach"]
    predicted = ["beach", "beach", "forest", "beach"]
    assert accuracy(true, predicted) == {
        "right": 2,
        "of": 4,
        "accuracy": 0.5,
        "classes": {
            "airport": {"right": 0, "of": 1, "accuracy": 0.0},
            "beach": {"right": 2, "of": 3, "accuracy": 2 / 3},
        },
    }


ONES = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: near_duplicates(ONES, 0), "a cosine of more than 0 and at most 1; got 0"),
        (lambda: matches(ONES, ONES, 1.01), "a cosine of more than 0 and at most 1; got 1.01"),
        (lambda: near_duplicates(ONES / 0, 0.9), "features of rows 0 to 2 are not finite"),
        (lambda: zero_shot(ONES, ONES[:1]), "two classes or more are to choose from; got 1"),
        (lambda: accuracy([], []), "no names to compare"),
        (lambda: accuracy(["a"], []), "shorter"),
    ],
)
def test_what_cannot_be_computed_is_refused(call, problem):
    with pytest.raises(ValueError, match=problem):
        call()
