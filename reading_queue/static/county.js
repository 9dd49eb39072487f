// The county's page: rows change by themselves, a report prints with one click.
import { Refused, getText, live, notice, waiting } from "/static/common.js";

const county = document.getElementById("county");

async function refresh() {
  try {
    county.innerHTML = await getText(county.dataset.rows);
  } catch (error) {
    if (!(error instanceof Refused)) throw error; // the stream says that the link is lost
  }
}

county.addEventListener("click", async (event) => {
  const print = event.target.closest("[data-print]");
  if (!print) return;
  try {
    const answer = await waiting(fetch(print.dataset.print));
    if (!answer.ok) {
      const problem = await answer.json();
      throw new Error(problem.detail || problem.title);
    }
    const frame = document.getElementById("print-frame");
    const address = URL.createObjectURL(await answer.blob());
    frame.onload = () => { frame.contentWindow.focus(); frame.contentWindow.print(); };
    frame.src = address;
  } catch (error) {
    notice(error.message);
  }
});
live(refresh);
