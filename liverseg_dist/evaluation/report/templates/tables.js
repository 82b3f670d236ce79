// The search box filters the table of cases.
const search = document.getElementById("search");
if (search) search.addEventListener("input", () => {
  const wanted = search.value.toLowerCase();
  document.querySelectorAll("#cases-table tbody tr").forEach((row) => {
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  });
});

