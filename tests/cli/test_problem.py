from qat.cli.problem import ConfigError, Problem, did_you_mean, extend, report


def test_nearest_option_or_nothing():
    assert did_you_mean("max_stpes", ["min_steps", "max_steps"]) == "; did you mean max_steps?"
    assert did_you_mean("zebra", ["max_steps"]) == ""


def test_a_later_stage_is_silent_about_places_that_are_settled():
    found = [Problem("a", "first")]
    extend(found, [Problem("a", "second"), Problem("b", "x"), Problem("b", "y"), Problem("b", "x")])
    assert found == [Problem("a", "first"), Problem("b", "x"), Problem("b", "y")]


def test_report_counts_and_lists():
    assert report("qat run", [Problem("a", "x")]) == "qat run: 1 problem\n  a: x"
    assert report("qat run", [Problem("a", "x"), Problem("b", "y")]).startswith("qat run: 2 problems\n")


def test_config_error_says_all_of_it():
    assert str(ConfigError([Problem("a", "x"), Problem("b", "y")])) == "a: x; b: y"
