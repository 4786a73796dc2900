"""Records of runs that were never made."""


def record(arm, seed, reward, stage="compare", rate=1e-3):
    return {
        "task": "house", "stage": stage, "arm": arm, "seed": seed,
        "learning_rate": rate, "rewards": [reward, reward + 0.2],
    }  # fmt: skip


def oracle_gains(gain):
    """Pairs whose differences have a spread of 0.001."""
    runs = []
    for seed in range(8):
        base = 0.5 + 0.01 * seed
        runs.append(record("uniform", seed, base, "gate"))
        runs.append(record("oracle", seed, base + gain + 0.001 * (-1) ** seed, "gate"))
    return runs
