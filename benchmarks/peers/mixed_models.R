# Mixed models with lme4 and glmmTMB: one line per fit, "model|peer|seconds|log likelihood|name=value ...".
# Rscript benchmarks/peers/mixed_models.R examples/data
data <- commandArgs(trailingOnly = TRUE)[1]
read <- function(name) read.csv(file.path(data, paste0(name, ".csv")), comment.char = "#")
installed <- function(name) suppressWarnings(requireNamespace(name, quietly = TRUE))

report <- function(model, peer, fit) {
  seconds <- sum(system.time(fitted <- suppressWarnings(suppressMessages(fit())))[1:2])
  if (peer == "lme4") {
    fixed <- lme4::fixef(fitted)
    covariances <- lme4::VarCorr(fitted)
    sigma <- if (lme4::isLMM(fitted)) sigma(fitted) else NULL
  } else {
    fixed <- glmmTMB::fixef(fitted)$cond
    covariances <- glmmTMB::VarCorr(fitted)$cond
    sigma <- if (family(fitted)$family == "gaussian") sigma(fitted) else NULL
  }
  covariances <- covariances[sort(names(covariances))]  # the peers order their groups differently
  sd <- unlist(lapply(covariances, function(v) attr(v, "stddev")))
  values <- c(fixed, sd, sigma)
  names(values) <- c(paste0("beta", seq_along(fixed) - 1), paste0("sd", seq_along(sd) - 1), if (!is.null(sigma)) "sigma")
  shown <- paste(sprintf("%s=%.6f", names(values), values), collapse = " ")
  cat(sprintf("%s|%s|%.3f|%.5f|%s\n", model, peer, seconds, as.numeric(logLik(fitted)), shown))
}

sleepstudy <- read("sleepstudy")
dyestuff <- read("dyestuff")
penicillin <- read("penicillin")
pastes <- read("pastes")
cbpp <- transform(read("cbpp"), period = factor(period))
epil <- transform(read("epil"), lbase = log(base) - mean(log(base)), lage = log(age) - mean(log(age)))
binomial_response <- cbind(incidence, size - incidence) ~ period + (1 | herd)
poisson_response <- seizures ~ lbase * progabide + lage + last + (1 | patient)

if (installed("lme4")) {
  library(lme4)
  report("dyestuff", "lme4", function() lmer(yield ~ 1 + (1 | batch), dyestuff, REML = FALSE))
  report("sleepstudy", "lme4", function() lmer(reaction ~ days + (days | subject), sleepstudy, REML = FALSE))
  report("penicillin", "lme4", function() lmer(diameter ~ 1 + (1 | plate) + (1 | sample), penicillin, REML = FALSE))
  report("pastes", "lme4", function() lmer(strength ~ 1 + (1 | batch) + (1 | cask), pastes, REML = FALSE))
  report("cbpp", "lme4", function() glmer(binomial_response, cbpp, binomial, nAGQ = 25))
  report("epil", "lme4", function() glmer(poisson_response, epil, poisson, nAGQ = 25))
}
if (installed("glmmTMB")) {
  library(glmmTMB)
  report("dyestuff", "glmmTMB", function() glmmTMB(yield ~ 1 + (1 | batch), dyestuff))
  report("sleepstudy", "glmmTMB", function() glmmTMB(reaction ~ days + (days | subject), sleepstudy))
  report("penicillin", "glmmTMB", function() glmmTMB(diameter ~ 1 + (1 | plate) + (1 | sample), penicillin))
  report("pastes", "glmmTMB", function() glmmTMB(strength ~ 1 + (1 | batch) + (1 | cask), pastes))
  report("cbpp", "glmmTMB", function() glmmTMB(binomial_response, cbpp, binomial))
  report("epil", "glmmTMB", function() glmmTMB(poisson_response, epil, poisson))
}
