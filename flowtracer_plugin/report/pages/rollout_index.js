/** Shows the rollouts that the list of choices names. */
(() => {
  const choice = document.getElementById("shown");
  const rows = [...document.querySelectorAll("#rollouts tbody tr")];

  function show() {
    for (const row of rows) {
      row.hidden = choice.value !== "all" && !row.dataset.is.split(" ").includes(choice.value);
    }
  }

  choice.addEventListener("change", show);
  show(); // a browser may remember the choice when the page is loaded again
})();
