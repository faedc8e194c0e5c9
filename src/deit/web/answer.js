// Turns a model's logits into the page's answer, by the rules of deit's Predictor and Calibration, for the fused heads.

// Returns {labels: [{label, score}], sure}. `labels` has at most `count` labels, the most likely first. `sure` says
// whether exactly one label is likely enough; without a calibration it is null. `calibration` is the content of
// calibration.json, or null.
export function answer(logits, names, calibration, count = 5) {
  const head = calibration?.heads.fused;
  const scores = probabilities(logits, head?.temperature ?? 1);
  const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a] || a - b);
  const labels = order.slice(0, count).map((i) => ({ label: names[i], score: scores[i] }));
  if (!head) return { labels, sure: null };
  const threshold = Math.fround(head.threshold);
  return { labels, sure: scores.filter((score) => score >= threshold).length === 1 };
}

// Returns the softmax of logits divided by a temperature. Logits and result are of type Float32Array.
export function probabilities(logits, temperature) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Array.from(logits, (logit) => Math.exp((logit - largest) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  return Float32Array.from(powers, (power) => power / sum);
}
