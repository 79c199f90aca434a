"""
The method, as pure functions of tensors: MMPO and the objectives it is compared with.

MMPO treats the response z as a latent variable and maximizes the marginal likelihood of what was
preferred. The sum over z runs over the responses at hand (Najafi and Fyshe, EACL 2026, arXiv
2510.22881):

    s_i  = log pi_theta(z_i|x) + R_i          R_i = r_i + beta log pi_ref(z_i|x)
    loss = -log sum_i exp s_i

R carries no gradient: it is the reward of a response plus the reference's opinion of it, both known
before training. No reference model runs beside the policy.

Three things are called reward. r_i is an input, one number a response. R_i adds the reference to it
and is what the loss takes. The "implicit reward", beta (log pi - log pi_ref) in DPO and beta times
the mean log pi in SimPO, is part of their losses. MMPO only logs it (rewards/*).

Shapes: B pairs, n responses each, the chosen one first (n = 2, or more). Log-probs are
summed over a response's tokens unless a docstring says mean; `lengths` counts those tokens.
"""
import torch
from torch.nn.functional import logsigmoid

# -----------------------------------------------------------------------------
# rewards: constants of a run


def rewards(r, ref_logps, beta):
    """R(y, z) = r(y, z) + beta log pi_ref(z|x).

    r (n,) or (B, n): 0.9 for chosen, 0.1 for rejected in the authors' runs. ref_logps (B, n): sums,
    or means with length_norm. Returns (B, n).
    """
    return r + beta * ref_logps


def normalize(R, group=0):
    """R (B, n), scaled into [0, 1] over groups of `group` consecutive pairs (0: all of them).

    R <- (R - min + 1e-6) / (max - min + 1e-6). The authors' group is a micro-batch of 2 pairs.
    """
    out = torch.empty_like(R)
    group = group or max(1, len(R))
    for i in range(0, len(R), group):
        g = R[i:i + group]
        out[i:i + len(g)] = (g - g.min() + 1e-6) / (g.max() - g.min() + 1e-6)
    return out


# -----------------------------------------------------------------------------
# MMPO


def posterior(logps, R):
    """q = softmax(logps + R), the weight of each response in the gradient. (B, n) -> (B, n)."""
    return (logps + R).softmax(-1)


def mmpo_loss(logps, R, pref_weight=0.0):
    """-logsumexp(s) - pref_weight log q_w, s = logps + R, q = softmax(s). (B, n), (B, n) -> (B,).

    Gradient of the first term: -sum_i q_i grad logps_i, a likelihood weighted by the posterior. For
    a pair log q_w = log sigmoid(s_w - s_l), and since log q_w = s_w - logsumexp(s), exactly

        loss = -s_w + (1 - pref_weight) log sigmoid(s_w - s_l)

    pref_weight 0 is MMPO; 1 is likelihood of the chosen response alone (neither R nor the rejected
    response changes the gradient); above 1 adds a contrastive term. Pass means as logps for
    length_norm.
    """
    s = logps + R
    J = s.logsumexp(-1)
    return -J - pref_weight * (s[:, 0] - J)


def entropy_bonus(per_token_logps, per_token_entropy, response, lengths, length_norm):
    """The authors' entropy ablation.

    H = sum_t [stopgrad(h_t) log pi(z_1..t) + h_t], mean over responses. per_token_logps,
    per_token_entropy (N,): of all response tokens, in order. response (N,): which response a token
    belongs to. lengths (B, n), in the same order, divide each H with length_norm. Returns (B,).
    """
    counts = lengths.flatten()
    ends = counts.cumsum(0)
    running = per_token_logps.cumsum(0)
    before = torch.cat((running.new_zeros(1), running))[ends - counts]    # sum before a response
    prefix_logps = running - before[response]
    terms = per_token_entropy.detach() * prefix_logps + per_token_entropy
    H = terms.new_zeros(len(counts)).index_add(0, response, terms)
    return (H / counts if length_norm else H).view(lengths.shape).mean(-1)


# -----------------------------------------------------------------------------
# baselines: (B,) log-probs in, (B,) losses out


def sft_loss(chosen_logps):
    """-log pi(z_w|x), or its mean over the response's tokens (`length_norm`)."""
    return -chosen_logps


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """-log sigmoid(beta [(log pi_w - log ref_w) - (log pi_l - log ref_l)])
    (Rafailov et al. 2023, eq. 7)."""
    return -logsigmoid(beta * (chosen_logps - ref_chosen_logps
                               - rejected_logps + ref_rejected_logps))


def ipo_loss(chosen_mean, rejected_mean, ref_chosen_mean, ref_rejected_mean, beta):
    """(log-ratio difference - 1/(2 beta))^2  (Azar et al. 2023, eq. 17), on mean log-probs as in
    TRL, since the paper says nothing of lengths."""
    return (chosen_mean - ref_chosen_mean - rejected_mean + ref_rejected_mean - 1 / (2 * beta)) ** 2


def simpo_loss(chosen_mean, rejected_mean, beta, gamma_beta_ratio):
    """-log sigmoid(beta (mean_w - mean_l) - gamma), gamma = gamma_beta_ratio beta
    (Meng et al. 2024, eq. 6)."""
    return -logsigmoid(beta * (chosen_mean - rejected_mean - gamma_beta_ratio))


def orpo_loss(chosen_mean, rejected_mean, orpo_lambda):
    """-mean_w - lambda log sigmoid(log odds_w - log odds_l), odds = p/(1-p), log p = mean log-prob
    (Hong et al. 2024, eq. 6-7)."""
    def log_odds(logp):   # log(1 - e^x) is log(-expm1(x)), and infinite where rounding made x 0
        logp = logp.clamp(max=-1e-7)
        return logp - torch.log(-torch.expm1(logp))
    return -chosen_mean - orpo_lambda * logsigmoid(log_odds(chosen_mean) - log_odds(rejected_mean))


# -----------------------------------------------------------------------------
# what train.py calls

OBJECTIVES = {   # each objective, and whether its loss reads the reference, in ref_logps or in R
    "mmpo": True, "dpo": True, "ipo": True,
    "simpo": False, "orpo": False, "sft": False,
}


# Settings that an objective's loss doesn't read, which a run tells if they are given all the same.
_OF_MMPO = ("pref_weight", "reward_chosen", "reward_rejected", "reward_norm", "reward_norm_group")
UNREAD = {
    "mmpo": ("gamma_beta_ratio", "orpo_lambda"),
    "dpo": (*_OF_MMPO, "length_norm", "gamma_beta_ratio", "orpo_lambda"),
    "ipo": (*_OF_MMPO, "length_norm", "gamma_beta_ratio", "orpo_lambda"),
    "simpo": (*_OF_MMPO, "length_norm", "orpo_lambda"),
    "orpo": (*_OF_MMPO, "length_norm", "beta", "gamma_beta_ratio"),
    "sft": (*_OF_MMPO, "beta", "gamma_beta_ratio", "orpo_lambda"),
}


def preference_loss(objective, logps, lengths, ref_logps, R, *, beta=0.05, length_norm=True,
                    pref_weight=0.0, gamma_beta_ratio=1.6, orpo_lambda=0.1):
    """Loss of each pair, (B,), from summed log-probs (B, n), token counts (B, n) and the constants
    ref_logps (B, n) and R (B, n), which some objectives don't read.

    DPO, SimPO, IPO and ORPO compare the first response (chosen) with the last (rejected).
    """
    means = logps / lengths
    ref_means = ref_logps / lengths
    if objective == "mmpo":
        return mmpo_loss(means if length_norm else logps, R, pref_weight)
    if objective == "sft":
        return sft_loss((means if length_norm else logps)[:, 0])
    if objective == "dpo":
        return dpo_loss(logps[:, 0], logps[:, -1], ref_logps[:, 0], ref_logps[:, -1], beta)
    if objective == "ipo":
        return ipo_loss(means[:, 0], means[:, -1], ref_means[:, 0], ref_means[:, -1], beta)
    if objective == "simpo":
        return simpo_loss(means[:, 0], means[:, -1], beta, gamma_beta_ratio)
    if objective == "orpo":
        return orpo_loss(means[:, 0], means[:, -1], orpo_lambda)
    raise ValueError(f'no line for the objective "{objective}" in preference_loss')


@torch.no_grad()
def measure(objective, logps, lengths, ref_logps, R, *, beta, length_norm, **knobs):
    """What is worth logging about B pairs, a dict of floats. knobs: see preference_loss.

    loss: their mean loss, without the entropy term. logps/* and rewards/* are TRL's names.
    rewards/*: implicit rewards, beta (log pi - log ref), or beta mean log pi where the objective
    doesn't read the reference. rewards/accuracies leaves beta out, since it may be 0.
    weights/*: q of the chosen response, with R; upweighted is the share with q > 1/n. accuracy/*:
    the share whose chosen response is the likelier one, by mean and by sum; a tie is half a one.
    Of n responses, margins and accuracies compare the first with the last.
    """
    losses = preference_loss(objective, logps, lengths, ref_logps, R, beta=beta,
                             length_norm=length_norm, **knobs)
    metrics = {"loss": losses.mean(), "logps/chosen": logps[:, 0].mean()}
    if logps.size(1) > 1:
        means = logps / lengths
        gains = logps - ref_logps if OBJECTIVES[objective] else means
        margins = gains[:, 0] - gains[:, -1]
        metrics |= {
            "logps/rejected": logps[:, -1].mean(),
            "rewards/accuracies": (margins > 0).float().mean(),
            "rewards/margins": beta * margins.mean(),
            "accuracy/mean": wins(means[:, 0] - means[:, -1]).mean(),
            "accuracy/sum": wins(logps[:, 0] - logps[:, -1]).mean(),
        }
        if OBJECTIVES[objective]:
            q = posterior(means if length_norm else logps, R)[:, 0]
            metrics["weights/chosen"] = q.mean()
            metrics["weights/upweighted"] = (q > 1 / R.size(1)).float().mean()
    return {name: value.item() for name, value in metrics.items()}


def wins(margins):
    """1 for each margin (N,) above 0, 0.5 for a tie, as a coin gives. Also numpy arrays."""
    return (margins > 0) + 0.5 * (margins == 0)


@torch.no_grad()
def kl_estimate(gaps, lengths):
    """KL(reference || policy) in nats a token, from S samples that the reference gave, and its
    standard error, where S is above 1.

    gaps (S, 1): log pi_ref - log pi_theta of each sample; lengths (S, 1): its tokens. kl is the
    ratio of their means, so its error is that of the mean of gaps - kl lengths, over mean length.
    """
    found = {"kl": gaps.sum() / lengths.sum()}
    if len(gaps) > 1:
        spread = (gaps - found["kl"] * lengths).std()
        found["kl_error"] = spread * len(gaps) ** 0.5 / lengths.sum()
    return {name: value.item() for name, value in found.items()}
