// Asking before a job is moved. The dialog stays open, with the reason, when the move is refused.

import { say } from "./dom.js";

/** Ask; on yes do it and close. Resolves when the dialog is closed. */
export function confirmed({ title, words, yes, no }, act) {
  const dialog = document.getElementById("ask");
  const yesButton = document.getElementById("ask-yes");
  const fault = document.getElementById("ask-fault");
  say(document.getElementById("ask-title"), title);
  say(document.getElementById("ask-words"), words);
  say(yesButton, yes);
  say(document.getElementById("ask-no"), no);
  fault.hidden = true;
  yesButton.disabled = false;
  yesButton.onclick = async () => {
    yesButton.disabled = true;
    try {
      await act();
      dialog.close();
    } catch (error) {
      say(fault, error.message);
      fault.hidden = false;
      yesButton.disabled = false;
    }
  };
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
}
