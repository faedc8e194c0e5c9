// Turns a model's logits into the page's answer, by the rules of deit's Predictor and Calibration, for the fused heads.

// Returns {labels: [{label, score}], sure}. `labels` has at most `count` labels, those with the largest scores first.
// `sure` says whether exactly one label is likely enough; without a calibration it is null. `calibration` is the content
// of calibration.json, or null. `scoring` is the rule in export.json that turns logits into scores.
export function answer(logits, names, calibration, scoring = "softmax", count = 5) {
  const head = calibration?.heads.fused;
  const scores = scoring === "softmax" ? probabilities(logits, head?.temperature ?? 1) : alone(logits, scoring);
  const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a] || a - b);
  const labels = order.slice(0, count).map((i) => ({ label: names[i], score: scores[i] }));
  if (!head) return { labels, sure: null };
  const threshold = Math.fround(head.threshold);
  return { labels, sure: scores.filter((score) => score >= threshold).length === 1 };
}

// Returns the scores of labels that don't exclude each other: the probability of each label, or a regression's outputs.
function alone(logits, scoring) {
  return scoring === "sigmoid" ? Float32Array.from(logits, (logit) => 1 / (1 + Math.exp(-logit))) : logits;
}

// Returns the softmax of logits divided by a temperature. Logits and result are of type Float32Array.
export function probabilities(logits, temperature) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Array.from(logits, (logit) => Math.exp((logit - largest) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  return Float32Array.from(powers, (power) => power / sum);
}
