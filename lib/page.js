"use strict";
// Shows one conversation at a time, of those that the filters let through. Without this script all
// of them are there, one below the other.
const form = document.querySelector(".filters");
const all = Array.from(document.querySelectorAll(".conversation"));
let matching = all;
let at = 0;

function matches(article) {
  const { variant, solved, failed, attempts, misread, repeated } = form.elements;
  const has = article.dataset;
  const solvedBy = JSON.parse(has.solved); // {arm: true or false}
  if (variant.value && variant.value !== has.variant) return false;
  if (solved.value && solvedBy[solved.value] !== true) return false;
  if (failed.value && solvedBy[failed.value] !== false) return false;
  if (misread.checked && has.misread !== "true") return false;
  if (repeated.checked && has.repeated !== "true") return false;
  return Number(has.attempts) >= Number(attempts.value);
}

function show(number) {
  at = Math.min(Math.max(number, 0), Math.max(matching.length - 1, 0));
  for (const article of all) article.hidden = article !== matching[at];
  const { count, previous, next } = form.elements;
  const place = matching.length ? `${at + 1} of ${matching.length}` : "none";
  count.value = matching.length < all.length ? `${place} (${all.length} in all)` : place;
  previous.disabled = at === 0;
  next.disabled = at >= matching.length - 1;
}

function filter() {
  const before = matching[at];
  matching = all.filter(matches);
  show(Math.max(matching.indexOf(before), 0));
}

function go(step) {
  show(at + step);
  form.scrollIntoView({ block: "nearest" });
}

function onKey(event) {
  const steps = { ArrowLeft: -1, k: -1, ArrowRight: 1, j: 1 };
  const typing = event.target.closest("select, input, .scroll");
  if (!steps[event.key] || typing || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  go(steps[event.key]);
}

if (form) {
  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.previous.addEventListener("click", () => go(-1));
  form.elements.next.addEventListener("click", () => go(1));
  document.addEventListener("keydown", onKey);
  filter(); // a browser may have kept what was chosen before a reload
}
