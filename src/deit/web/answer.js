// From a model's logits to what the page says: the rules of deit's Predictor and Calibration, for the fused heads.

// `calibration` is the content of calibration.json, or null. `scoring` is export.json's: what turns logits into scores.
// Returns {labels: [{label, score}], sure}: at most `count` labels, those with the largest scores first. `sure` is null
// if nothing is calibrated, else whether exactly one label is likely enough.
export function answer(logits, names, calibration, scoring = "softmax", count = 5) {
  const head = calibration?.heads.fused;
  const scores = scoring === "softmax" ? probabilities(logits, head?.temperature ?? 1) : alone(logits, scoring);
  const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a] || a - b);
  const labels = order.slice(0, count).map((i) => ({ label: names[i], score: scores[i] }));
  if (!head) return { labels, sure: null };
  const threshold = Math.fround(head.threshold);
  return { labels, sure: scores.filter((score) => score >= threshold).length === 1 };
}

// Scores of labels that don't exclude each other: each one's probability, or the output of a regression.
function alone(logits, scoring) {
  return scoring === "sigmoid" ? Float32Array.from(logits, (logit) => 1 / (1 + Math.exp(-logit))) : logits;
}

// Softmax of logits divided by a temperature, Float32Array both.
export function probabilities(logits, temperature) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Array.from(logits, (logit) => Math.exp((logit - largest) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  return Float32Array.from(powers, (power) => power / sum);
}
