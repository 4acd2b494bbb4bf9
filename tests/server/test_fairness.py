"""The virtual token counter: who is owed service, and that nobody earns credit by staying away."""

from server.fairness import ANSWER_WEIGHT, FairShare


def test_service_counts_by_weight() -> None:
    shares = FairShare()
    shares.join("a")
    shares.charge("a", prompt_tokens=10, answer_tokens=3)
    assert shares.served("a") == 10 + 3 * ANSWER_WEIGHT


def test_who_comes_late_starts_level_with_the_least_served() -> None:
    shares = FairShare()
    shares.join("a"), shares.join("b")
    shares.charge("a", prompt_tokens=100), shares.charge("b", prompt_tokens=40)
    shares.join("c")
    assert shares.served("c") == 40


def test_leaving_and_coming_back_clears_no_debt() -> None:
    shares = FairShare()
    shares.join("a"), shares.join("b")
    shares.charge("a", prompt_tokens=100)
    shares.leave("a")
    shares.join("a")
    assert shares.served("a") == 100


def test_debts_below_everyone_elses_service_are_forgotten() -> None:
    shares = FairShare()
    shares.join("b")
    for number in range(1000):
        shares.join(f"a{number}")
        shares.charge(f"a{number}", prompt_tokens=10)
        shares.leave(f"a{number}")
        shares.charge("b", prompt_tokens=20)
    shares.join("x"), shares.leave("x")
    assert len(shares._served) <= 3


def test_an_idle_engine_owes_nobody() -> None:
    shares = FairShare()
    shares.join("a")
    shares.charge("a", prompt_tokens=100)
    shares.leave("a")
    shares.join("a"), shares.join("b")
    assert shares.served("a") == shares.served("b") == 0
