"use strict";
/* The page around the ballot: draws the open question, listens to keys and clicks. */
const study = JSON.parse(document.getElementById("study").textContent);
const pictures = JSON.parse(document.getElementById("pictures").textContent);
const the = (id) => document.getElementById(id);
const ballot = new Ballot(study, storage(), Date.now, () => {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
});
let started = ballot.answered > 0;

function storage() {
  try { return window.localStorage; } catch { return null; }
}

function image(number, words) {
  const img = document.createElement("img");
  img.src = pictures[number];
  img.alt = words;
  img.draggable = false;
  img.onload = () => img.classList.toggle("small", Math.max(img.naturalWidth, img.naturalHeight) <= study.small);
  return img;
}

function button(number, label, words, content) {
  const made = document.createElement("button");
  made.type = "button";
  made.dataset.number = number;
  if (words) made.setAttribute("aria-label", words);
  if (content) made.append(content);
  const key = document.createElement("kbd");
  key.textContent = label;
  made.append(key);
  made.onclick = () => vote(number);
  return made;
}

function draw() {
  const question = ballot.question;
  the("welcome").hidden = started;
  the("vote").hidden = !started || !question;
  the("end").hidden = !started || Boolean(question);
  the("back").disabled = !started || ballot.state.at === 0;
  the("progress").max = ballot.total;
  the("progress").value = ballot.answered;
  the("count").textContent = `${ballot.answered} of ${ballot.total}`;
  if (!started) return;
  if (!question) return drawEnd();
  the("text").textContent = question.text;
  the("asked").hidden = !question.text;
  the("before").replaceChildren(...(question.input ? [image(question.input, "The picture before the edit")] : []));
  the("given").hidden = !question.input;
  const rating = study.design === "likert";
  the("options").replaceChildren(...question.options.map((number, i) => (
    rating ? image(number, "The edit") : option(number, i + 1)
  )));
  the("answers").replaceChildren(...(rating ? scale() : []), ...(study.ties ? [nothing()] : []));
  const place = `Question ${ballot.state.at + 1} of ${ballot.total}. `;
  the("said").textContent = place + (question.text ? `Asked for: ${question.text}.` : "");
}

/* A picture as a button: its key, and in a ranking the place it was given. */
function option(number, key) {
  const made = button(key, key, `Picture ${key}`, image(number, ""));
  const ranking = study.design === "rank" ? (ballot.picked.length ? ballot.picked : ballot.given ?? []) : [];
  const place = ranking.indexOf(number) + 1;
  if (place) {
    const mark = document.createElement("b");
    mark.textContent = place;
    made.append(mark);
    made.setAttribute("aria-label", `Picture ${key}, place ${place}`);
  }
  made.setAttribute("aria-pressed", String(place > 0 || ballot.given === number));
  return made;
}

function scale() {
  const words = { 1: "bad", [study.points]: "excellent" };
  return Array.from({ length: study.points }, (_, i) => {
    const made = button(i + 1, i + 1, `${i + 1} of ${study.points}`, words[i + 1] ?? "");
    made.setAttribute("aria-pressed", String(ballot.given === i + 1));
    return made;
  });
}

function nothing() {
  const made = button(0, 0, "No difference", "no difference");
  made.setAttribute("aria-pressed", String(ballot.given === "tie"));
  return made;
}

function drawEnd() {
  const left = ballot.total - ballot.answered;
  the("left").hidden = left === 0;
  the("left").textContent = `${left} left unanswered.`;
  the("said").textContent = "That was the last question. Save your votes.";
  the("save").focus();
}

function vote(number) {
  const focused = document.activeElement?.dataset?.number;
  if (!ballot.choose(number)) return;
  draw();
  if (focused !== undefined && ballot.question) document.querySelector(`[data-number="${focused}"]`)?.focus();
}

function start() {
  ballot.call(the("name").value.trim());
  started = true;
  draw();
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${JSON.stringify(ballot.file(), null, 1)}\n`], { type: "application/json" }));
  link.download = `votes-${study.id}-${ballot.state.voter}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.tagName === "INPUT") return;
  const two = study.design === "2afc" ? { ArrowLeft: 1, ArrowRight: 2, ArrowDown: 0 } : {};
  const number = /^[0-9]$/.test(event.key) ? Number(event.key) : two[event.key];
  if (event.key === "Backspace") {
    if (ballot.picked.length) ballot.picked.pop();
    else ballot.back();
    draw();
  } else if (number !== undefined && started) vote(number);
  else return;
  event.preventDefault();
});
the("name").value = ballot.state.name;
the("begin").onsubmit = (event) => { event.preventDefault(); start(); };
if (!started) document.querySelector("#begin button").focus();
the("back").onclick = () => { ballot.back(); draw(); };
for (const each of document.querySelectorAll(".save")) each.onclick = save;
draw();
