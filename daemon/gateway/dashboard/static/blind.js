// Blind votes: two answers without names, by the keys 1, 2 and 0. Which side is whose is decided and kept by the
// gateway; the names are told when there is nothing left to vote on.

import { el, say, mark, plain } from "./dom.js";
import { ask } from "./store.js";
import { back, namesOf, promptCaption, answerBox, tallyTable } from "./comparisons.js";

const SIDES = { 1: "left", 2: "right", 0: "tie" };
const VOTER = "voter";

/** Build the page of blind votes into an element; returns how to end it. */
export function blindPage(view, id) {
  const path = `/dashboard/comparisons/${encodeURIComponent(id)}`;
  const page = el("article", { class: "comparison" });
  const place = el("div");
  let ended = false;
  let pair = null; // what is voted on now
  let asked = null; // voter and contestants
  let sending = false;

  view.replaceChildren(page);
  page.append(back(`#/comparisons/${encodeURIComponent(id)}`, "Comparison"), place);
  document.title = "Blind votes · brightrun trainer";

  // The names alone: the page that lists answers beside them is another one, and is not asked for here.
  ask(`${path}/names`)
    .then((told) => ended || start(namesOf(told)))
    .catch((error) => ended || place.replaceChildren(el("p", { class: "empty", role: "alert", text: error.message })));

  function start(names) {
    const pairs = names.flatMap((one, i) => names.slice(i + 1).map((two, j) => [i, i + 1 + j, `${one} and ${two}`]));
    const choice = el(
      "select",
      { id: "pair" },
      ...pairs.map(([one, two, words]) => el("option", { value: `${one} ${two}`, text: words })),
    );
    const voter = el("input", { id: "voter", required: true, maxlength: 60, autocomplete: "nickname" });
    voter.value = localStorage.getItem(VOTER) ?? "";
    const refused = el("p", { class: "fault", role: "alert", hidden: true });
    const button = el("button", { class: "primary", type: "submit", text: "Begin" });
    const form = el(
      "form",
      {
        class: "login",
        on: {
          submit: async (event) => {
            event.preventDefault();
            const [one, two] = choice.value.split(" ").map(Number);
            asked = { voter: voter.value, one, two };
            button.disabled = true;
            refused.hidden = true;
            try {
              const told = await ask(`${path}/ballot`, { method: "POST", body: asked });
              localStorage.setItem(VOTER, voter.value);
              show(told, names);
            } catch (error) {
              say(refused, error.message);
              refused.hidden = false;
              button.disabled = false;
            }
          },
        },
      },
      el("h1", { text: "Vote blind" }),
      el("label", { for: "voter", text: "Your name" }),
      voter,
      el("label", { for: "pair", text: "Compare" }),
      choice,
      el("p", {
        class: "muted",
        text: "You see two answers without names, in an order that is drawn for you. The names are told at the end. You may leave and go on later, under the same name.",
      }),
      refused,
      button,
    );
    place.replaceChildren(form);
    if (pairs.length === 1) form.querySelectorAll("label[for=pair], #pair").forEach((element) => (element.hidden = true));
    (voter.value ? button : voter).focus();
  }

  function show(told, names) {
    if (ended) return;
    pair = told.pair ?? null;
    if (!pair) return showResult(told, names);
    const number = told.done + 1;
    const refused = el("p", { class: "fault", role: "alert", hidden: true, id: "vote-fault" });
    const button = (key, words) =>
      el(
        "button",
        { type: "button", "data-side": SIDES[key], "aria-keyshortcuts": key, on: { click: () => vote(SIDES[key], names) } },
        el("kbd", { text: key }),
        document.createTextNode(words),
      );
    place.replaceChildren(
      el(
        "header",
        { class: "heading" },
        el("h1", { text: "Which answer is better?" }),
        el("p", { class: "muted", id: "count", role: "status", text: `${number} of ${told.prompts}` }),
      ),
      el("progress", { max: told.prompts, value: told.done, "aria-label": "votes" }),
      el(
        "div",
        { class: "samples blind" },
        el(
          "figure",
          { "data-number": pair.number },
          promptCaption(pair),
          el("div", { class: "answers" }, answerBox("Answer 1", pair.left), answerBox("Answer 2", pair.right)),
        ),
      ),
      el("div", { class: "choices" }, button(1, "Answer 1"), button(0, "Neither, or both"), button(2, "Answer 2")),
      refused,
    );
    window.scrollTo(0, 0);
  }

  async function vote(side, names) {
    if (sending || !pair) return;
    sending = true;
    for (const button of place.querySelectorAll(".choices button")) button.disabled = true;
    try {
      show(await ask(`${path}/votes`, { method: "POST", body: { ...asked, number: pair.number, side } }), names);
    } catch (error) {
      if (ended) return;
      const refused = document.getElementById("vote-fault");
      say(refused, error.message);
      refused.hidden = false;
      for (const button of place.querySelectorAll(".choices button")) button.disabled = false;
    } finally {
      sending = false;
    }
  }

  function showResult(told, names) {
    const [one, two] = [names[asked.one], names[asked.two]];
    const words = { one, two, tie: "neither, or both" };
    place.replaceChildren(
      el("header", { class: "heading" }, el("h1", { text: "That was all" })),
      el(
        "section",
        { class: "part", id: "result" },
        el("h2", { text: "You preferred" }),
        el(
          "dl",
          { class: "numbers" },
          ...["one", "two", "tie"].map((choice) =>
            el("div", { "data-choice": choice }, el("dt", { text: words[choice] }), el("dd", { text: told.mine.votes[choice] })),
          ),
        ),
        el("p", { class: "verdict", text: told.mine.words }),
        el("ol", { class: "choices-made", "aria-label": "Your choices" }, ...Object.entries(told.choices).map(([number, choice]) =>
          el("li", {}, el("span", { class: "muted", text: `Prompt ${number}` }), el("span", { text: words[choice] })))),
      ),
      el("section", { class: "part" }, el("h2", { text: `All votes on ${one} and ${two}` }), tallyTable(told.all, names)),
      el("a", { href: `#/comparisons/${encodeURIComponent(id)}`, text: "See all answers with their names" }),
    );
    mark(place, "data-done", true);
    document.title = plain(`${one} and ${two} · brightrun trainer`);
  }

  function press(event) {
    const typing = event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement;
    if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey || !pair) return;
    if (!Object.hasOwn(SIDES, event.key)) return;
    event.preventDefault();
    place.querySelector(`.choices [data-side=${SIDES[event.key]}]:not(:disabled)`)?.click();
  }
  document.addEventListener("keydown", press);
  return () => {
    ended = true;
    document.removeEventListener("keydown", press);
    document.title = "brightrun trainer";
  };
}
